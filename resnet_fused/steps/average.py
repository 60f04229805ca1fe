"""Steps with an average pool: of a norm with ReLU in one pass, of a tensor, and before the convolution that it follows.

An average commutes with a 1x1 convolution, so behind one it is taken first: the convolution then has a quarter of the
pixels, where windows are 2x2. What is averaged is a batch norm with ReLU, which is never written.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..backends import run
from . import conv as convolutions
from .conv import channels_last
from .flow import Backward, Forward, as_lazy
from .kinds import Kind, conv_grads, pooled_norm_grads
from .lazy import Lazy, Pending
from .program import Program
from .spec import Average
from .value_kinds import value_grads

aten = torch.ops.aten
OPS = ("norm_relu_avg_pool", "norm_relu_avg_pool_backward", "norm_relu_avg_pool_apply")


def _averaged(f: Forward, number: int, average: Average, on_load: bool) -> Tensor:
    """The averages of a value; `on_load`: of a norm with ReLU that was not written, in one pass."""
    value = f.values[number]
    if on_load and isinstance(value, Lazy):
        settings = (average.kernel, average.stride)
        return run("norm_relu_avg_pool", value.z, value.bn.scale, value.bn.shift, *settings, backend=f.backend)
    return channels_last(aten.avg_pool2d(f.tensor(number), *average.args))


def _give_through(b: Backward, number: int, average: Average, grad: Tensor) -> None:
    """Give the source of a norm with ReLU, value `number`, its gradient from the one at the averages of the norm."""
    source, settings = b.program.maker(number).source, (average.kernel, average.stride)
    pooled = pooled_norm_grads(b, number, "norm_relu_avg_pool", (grad, b.values[number].z), settings)
    if b.wanted[source]:
        b.give(source, Pending(run("norm_relu_avg_pool_apply", *pooled, *settings, backend=b.backend)))


@dataclasses.dataclass(frozen=True)
class AverageValue(Kind):
    """The average pool that makes `value`. `on_load`: of a norm with ReLU, whole windows, without writing that.

    `alone`: nobody else reads the norm, whose own source then has its gradient from here.
    """

    on_load: bool = False
    alone: bool = False

    @property
    def word(self) -> str:
        return "norm, ReLU and average in one pass" if self.on_load else "average"

    def ops(self, program: Program) -> tuple[str, ...]:
        return OPS if self.alone else OPS[:1] if self.on_load else ()

    def forward(self, f: Forward) -> None:
        node = f.program.maker(self.value)
        f.values[self.value] = f.output = _averaged(f, node.source, node.average, self.on_load)

    def backward(self, b: Backward, grad: Pending) -> None:
        node = b.program.maker(self.value)
        if not b.wanted[node.source]:
            return
        if self.alone and isinstance(b.values[node.source], Lazy):
            _give_through(b, node.source, node.average, grad.grad)
            return
        read = b.like(node.source, grad.grad)
        spread = aten.avg_pool2d_backward(channels_last(grad.grad), read, *node.average.args)
        b.give(node.source, Pending(channels_last(spread)))


@dataclasses.dataclass(frozen=True)
class AverageConvolve(Kind):
    """The average pool that makes `value`, the end of a transition, and the 1x1 convolution before it, after it.

    `on_value`: by the 1x1 ops; `statistics`: these emit those of the output, for a norm that may follow.
    """

    on_value: bool = False
    statistics: bool = False

    @property
    def word(self) -> str:
        return "norm, ReLU and average in one pass; 1x1 on values" if self.on_value else "average before convolution"

    def ops(self, program: Program) -> tuple[str, ...]:
        return (*OPS, "conv1x1", "conv1x1_dgrad", "conv1x1_wgrad") if self.on_value else OPS

    def forward(self, f: Forward) -> None:
        number = f.program.maker(self.value).source
        node, own = f.program.maker(number), f.tensors[number]
        pooled = _averaged(f, node.source, f.program.maker(self.value).average, on_load=True)
        if self.on_value:
            arguments = (pooled, own.weight.contiguous(), None, None, node.conv.stride, self.statistics)
            out, *moments = run("conv1x1", *arguments, backend=f.backend)
            moments = moments[:2] if self.statistics else None
        else:
            arguments = (pooled, own.weight, own.bias, node.conv, f.backend, self.statistics, f.program.precision)
            out, moments = convolutions.conv2d(*arguments)
        if moments is not None:
            f.emitted[self.value] = tuple(moments)
        if f.wanted[number]:
            f.winners[self.value] = pooled
        f.values[self.value] = f.output = out

    def backward(self, b: Backward, grad: Pending) -> None:
        last = b.program.maker(self.value)
        if not b.wanted[last.source]:
            return
        node, pooled = b.program.maker(last.source), b.winners[self.value]
        if self.on_value:
            grad_pooled = value_grads(b, last.source, as_lazy(grad), pooled, pooled, None)
        else:
            grad_pooled = conv_grads(b, last.source, grad.grad, pooled, node.conv)
        if grad_pooled is not None:
            _give_through(b, node.source, last.average, grad_pooled)
