"""Steps with an average pool: of a norm with ReLU in one pass, of a tensor, and before the convolution that it follows.

An average commutes with a 1x1 convolution, so behind one it is taken first: the convolution then has a quarter of the
pixels, where windows are 2x2. What is averaged is a batch norm with ReLU, which is never written.
"""

from __future__ import annotations

import dataclasses

import torch

from ..backends import run
from . import conv as convolutions
from . import pointwise
from .batch_norm import coefficients
from .conv import channels_last
from .flow import Backward, Forward, as_lazy
from .kinds import conv_grads, norm_grads
from .lazy import Lazy, LazyGrad, Pending
from .program import Program
from .spec import Average, StepGrads

Tensor = torch.Tensor
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
    norm, (z, bn, _) = b.program.maker(number), b.values[number]
    settings = (average.kernel, average.stride)
    vectors = (bn.mean, bn.scale, bn.shift)
    sums = run("norm_relu_avg_pool_backward", grad, z, *vectors, *settings, backend=b.backend)
    c = coefficients(bn, *sums, z, norm.norm, b.backend)
    norm_grads(b, number, LazyGrad(grad, z, c, bn))
    if b.wanted[norm.source]:
        vectors = (c.a, c.b, c.d, bn.scale, bn.shift)
        grad_x = run("norm_relu_avg_pool_apply", grad, z, *vectors, *settings, backend=b.backend)
        b.give(norm.source, Pending(grad_x))


@dataclasses.dataclass(frozen=True)
class AverageValue:
    """The average pool that makes `value`. `on_load`: of a norm with ReLU, whole windows, without writing that.

    `alone`: nobody else reads the norm, whose own source then has its gradient from here.
    """

    value: int
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

    def backward(self, b: Backward) -> None:
        node, grad = b.program.maker(self.value), b.dense(self.value)
        if grad is None or not b.wanted[node.source]:
            return
        if self.alone and isinstance(b.values[node.source], Lazy):
            _give_through(b, node.source, node.average, grad.grad)
            return
        read = b.like(node.source, grad.grad)
        spread = aten.avg_pool2d_backward(channels_last(grad.grad), read, *node.average.args)
        b.give(node.source, Pending(channels_last(spread)))


@dataclasses.dataclass(frozen=True)
class AverageConvolve:
    """The average pool that makes `value`, the end of a transition, and the 1x1 convolution before it, after it.

    `on_value`: by the 1x1 ops; `statistics`: these emit those of the output, for a norm that may follow.
    """

    value: int
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

    def backward(self, b: Backward) -> None:
        last, grad = b.program.maker(self.value), b.dense(self.value)
        if grad is None or not b.wanted[last.source]:
            return
        node, pooled = b.program.maker(last.source), b.winners[self.value]
        if self.on_value:
            grad_pooled = _value_grads(b, last.source, as_lazy(grad), pooled)
        else:
            grad_pooled = conv_grads(b, last.source, grad.grad, pooled, node.conv)
        if grad_pooled is not None:
            _give_through(b, node.source, last.average, grad_pooled)


def _value_grads(b: Backward, number: int, grad: LazyGrad, read: Tensor) -> Tensor | None:
    """As :func:`.kinds.conv_grads`, by the 1x1 ops; the convolution has no bias."""
    own, need, grad_read = b.tensors[number], b.needs[number], None
    if b.wanted[b.program.maker(number).source]:
        grad_read, product = pointwise.input_grad(grad, read, None, own.weight, b.backend, weight_grad=need.weight)
    else:
        product, *_ = pointwise.weight_grad(grad, read, b.backend, (1, 1), rounded=True)
    if need.weight:
        b.grads[number] = StepGrads(product.view(own.weight.shape))
    return grad_read
