"""Kinds of steps for devices whose 1x1 kernels take values: they normalise on load, and emit what batch norm needs.

==========================  ==========================================================================================
:class:`ConvolveValue`      a 1x1 convolution of a value, with the statistics for the norm behind it
:class:`ConvolveValueAdd`   a 1x1 convolution of a value and the addition behind it, as one product
==========================  ==========================================================================================

Backward the product's epilogue takes the gradient through the ReLU before it and emits the two sums of that batch norm,
or adds the gradient of a value's other reader.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..backends import run
from ..ops import stat_dtype
from . import pointwise
from .batch_norm import Coefficients
from .flow import EVERY, Backward, Forward, Pending
from .kinds import as_step, give_source
from .lazy import Lazy, LazyGrad
from .pointwise import PathGrad, parts
from .spec import Norm, Step, StepGrads

Tensor = torch.Tensor
_AS_IS = Coefficients(None, None, None, None, None)


def as_lazy(grad: Pending) -> LazyGrad:
    """A gradient as the 1x1 ops take it."""
    return grad.grad if isinstance(grad.grad, LazyGrad) else LazyGrad(grad.grad, None, _AS_IS, None)


def value_backward(b: Backward, number: int, grad: LazyGrad) -> None:
    """Gradients of the weight of the 1x1 convolution that makes value `number`, and of what it read."""
    node, own, need = b.program.maker(number), b.tensors[number], b.needs[number]
    step, value = Step(node.conv, Norm()), b.values[node.source]
    if need.weight:
        b.grads[number] = StepGrads(pointwise.weight_grad(grad, value, step, own.weight, b.backend))
    if not b.wanted[node.source]:
        return
    norm = b.program.maker(node.source)
    if isinstance(value, Lazy) and len(b.program.readers(node.source)) == 1:
        through = pointwise.input_grad(grad, value, step, as_step(norm), own.weight, b.backend)
        give_source(b, node.source, through, owned=True)
        return
    read = value.z if isinstance(value, Lazy) else value
    known = b.take(node.source) if node.conv.stride == EVERY else None
    other = None if known is None else PathGrad(known.grad, None, known.pixels)
    grad_read = pointwise.input_grad(grad, read, step, None, own.weight, b.backend, other)
    b.give(node.source, Pending(grad_read, True, node.conv.stride))


@dataclasses.dataclass(frozen=True)
class ConvolveValue:
    """The 1x1 convolution that makes `value`; `statistics`: a norm reads it."""

    ops: ClassVar[tuple[str, ...]] = ("conv1x1", "conv1x1_dgrad", "conv1x1_wgrad", "bn_coefficients")

    value: int
    statistics: bool

    def forward(self, f: Forward) -> None:
        node, own = f.program.maker(self.value), f.tensors[self.value]
        x, scale, shift = parts(f.values[node.source])
        arguments = (x, own.weight.contiguous(), scale, shift, node.conv.stride, self.statistics)
        z, mean, m2 = run("conv1x1", *arguments, backend=f.backend)
        f.values[self.value] = z
        if self.statistics:
            f.emitted[self.value] = mean, m2

    def backward(self, b: Backward) -> None:
        grad = b.dense(self.value)
        if grad is not None:
            value_backward(b, self.value, as_lazy(grad))


@dataclasses.dataclass(frozen=True)
class ConvolveValueAdd:
    """The addition that makes `value` and the 1x1 convolution of stride 1, read by it alone, that makes its branch."""

    ops: ClassVar[tuple[str, ...]] = ("conv1x1_join", "conv1x1_dgrad", "conv1x1_wgrad", "norm_add_relu_backward")

    value: int

    def forward(self, f: Forward) -> None:
        add = f.program.maker(self.value)
        node, own = f.program.maker(add.branch), f.tensors[add.branch]
        x, scale, shift = parts(f.values[node.source])
        weight, stat = own.weight.contiguous(), stat_dtype(x.dtype)
        ones = torch.ones(weight.shape[0], dtype=stat, device=x.device)
        bias = torch.zeros_like(ones) if own.bias is None else own.bias.to(stat)
        options = {"residual": f.tensor(add.other), "relu": add.relu, "emit_mask": add.relu}
        options |= {"sample_factor": f.sample_factor if add.sampled else None}
        out, mask = run("conv1x1_join", x, weight, ones, bias, scale, shift, **options, backend=f.backend)
        f.values[self.value] = out
        if add.relu:
            f.masks[self.value] = mask

    def backward(self, b: Backward) -> None:
        add, grad = b.program.maker(self.value), b.dense(self.value)
        if grad is None:
            return
        mask = b.masks.get(self.value)
        factor = b.sample_factor if add.sampled else None
        branch = LazyGrad(grad.grad, None, _AS_IS, None, sample_factor=factor, mask=mask)
        if b.wanted[add.branch]:
            value_backward(b, add.branch, branch)
            if b.needs[add.branch].bias:
                b.grads[add.branch] = b.grads[add.branch]._replace(bias=_bias_grad(branch, b.backend))
        if b.wanted[add.other] and mask is not None:
            grad = Pending(run("norm_add_relu_backward", grad.grad, mask=mask, backend=b.backend)[0])
        b.give(add.other, grad)


def _bias_grad(grad: LazyGrad, backend: str) -> Tensor:
    g = grad.g
    if grad.mask is not None:
        g = run("norm_add_relu_backward", g, mask=grad.mask, backend=backend)[0]
    if grad.sample_factor is not None:
        g = g * grad.sample_factor.to(g.dtype).view(-1, 1, 1, 1)
    return g.sum((0, 2, 3), dtype=stat_dtype(g.dtype))
