"""Kinds of steps for devices whose convolutions take values: they normalise on load, and emit what batch norm needs.

Of 1x1 convolutions both gradients are on values too; those of other filters are PyTorch's, on what is written for them.
Backward the product's epilogue takes the gradient through the ReLU before it and emits the two sums of that batch norm,
or adds the gradient of a value's other reader. One op makes both gradients, where the convolution is narrow in one
pass.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ..backends import run
from ..ops import stat_dtype
from . import pointwise
from .batch_norm import affine_of, parameters
from .flow import Backward, Forward, as_lazy
from .kinds import Kind, conv_backward, give_source
from .lazy import EVERY, Lazy, LazyGrad, Pending, Value, as_it_is
from .pointwise import parts
from .program import Normalisation, Program
from .spec import Norm, StepGrads


def give_read(b: Backward, number: int, grad: Tensor | LazyGrad, pixels: tuple[int, int]) -> None:
    """Give what a 1x1 convolution read its gradient: that of value `number`, or already the one before its ReLU."""
    if isinstance(grad, LazyGrad) and isinstance(b.values[number], Lazy):
        give_source(b, number, grad, owned=True)
    elif isinstance(grad, LazyGrad):  # whose own step goes on
        b.through[number] = grad.coefficients.grad_beta
        b.give(number, Pending(grad.g))
    else:
        b.give(number, Pending(grad, True, pixels))


def read_alone(b: Backward, number: int) -> tuple[Value, Norm | None]:
    """What a 1x1 convolution's gradient is of: a lazy value that nobody else reads, with its norm; else a tensor.

    One whose ReLU left no bits (:class:`.frozen.FrozenJoin`) is a lazy value too, by which the ReLU is known.
    """
    value, alone = b.values[number], len(b.program.readers(number)) == 1
    if alone and _left_no_bits(b, number):
        value = as_it_is(value)
    if alone and isinstance(value, Lazy):
        return value, b.program.maker(number).norm
    return (value.z if isinstance(value, Lazy) else value), None


def _left_no_bits(b: Backward, number: int) -> bool:
    """Whether a value is a tensor behind a norm and a ReLU that a gradient is still to pass."""
    node, written = b.program.maker(number), isinstance(b.values[number], Tensor)
    return written and isinstance(node, Normalisation) and node.relu and b.wanted[number] and number not in b.masks


def value_backward(b: Backward, number: int, grad: LazyGrad, one_pass: bool = False) -> None:
    """Gradients of the weight of the 1x1 convolution that makes value `number`, and of what it read."""
    node = b.program.maker(number)
    grad_read = value_grads(b, number, grad, b.values[node.source], *read_alone(b, node.source), one_pass)
    if grad_read is not None:
        give_read(b, node.source, grad_read, node.conv.stride)


def value_grads(
    b: Backward, number: int, grad: LazyGrad, value: Value, read: Value, previous: Norm | None, one_pass: bool = False
) -> Tensor | LazyGrad | None:
    """As :func:`.kinds.conv_grads` of a 1x1 convolution without bias, by the 1x1 ops.

    `value`: what it read, `read` and `previous`: what the gradient returned is of, see :func:`read_alone`.
    """
    node, own, need = b.program.maker(number), b.tensors[number], b.needs[number]
    stride, wanted, grad_read, other = node.conv.stride, b.wanted[node.source], None, None
    if wanted and previous is None and stride == EVERY:
        other = b.take(node.source)
    coupled = other is not None and other.correction is not None
    both = need.weight and wanted and (previous is not None or not isinstance(value, Lazy))
    if both and one_pass and pointwise.narrow(node.conv, own.weight, coupled):
        grad_read, product, _ = pointwise.both_grads(grad, read, previous, own.weight, b.backend, other, rounded=True)
    elif wanted:
        arguments = (grad, read, previous, own.weight, b.backend, stride, other)
        grad_read, product = pointwise.input_grad(*arguments, weight_grad=both)
    if need.weight and not both:
        product, *_ = pointwise.weight_grad(grad, value, b.backend, stride, rounded=True)
    if need.weight:
        b.grads[number] = StepGrads(product.view(own.weight.shape))
    return grad_read


def _convolve(f: Forward, value: int, op: str, weight: Tensor, statistics: bool, *where) -> None:
    """Make `value` by the convolution `op`, which takes values. `where`: its arguments before `emit_stats`."""
    x, scale, shift = parts(f.values[f.program.maker(value).source])
    readers, norm, options = f.program.readers(value), None, {}
    if statistics and len(readers) == 1:  # what that norm makes of the statistics comes with them
        (norm,) = readers
        options = parameters(f.tensors[norm], f.program.maker(norm).norm)
    z, *found = run(op, x, weight, scale, shift, *where, statistics, **options, backend=f.backend)
    f.values[value] = z
    if norm is not None:
        f.affine[norm] = affine_of(found, z)
    elif statistics:
        f.emitted[value] = found[0], found[1]


@dataclasses.dataclass(frozen=True)
class ConvolveTaps(Kind):
    """The convolution by any filter that makes `value`; `statistics`: a norm reads it, and normalises with the batch.

    Forward a norm before it is never written, and the norm behind it reads nothing again. Backward what it read is
    written, for PyTorch's gradient of the weight.
    """

    statistics: bool = False
    word: ClassVar[str] = "convolution on values"

    def ops(self, program: Program) -> tuple[str, ...]:
        again = ("norm_add_relu",) if program.is_lazy(program.maker(self.value).source) else ()
        return ("conv_values", *again, "lazy_grad_apply")

    def forward(self, f: Forward) -> None:
        node, own = f.program.maker(self.value), f.tensors[self.value]
        _convolve(f, self.value, "conv_values", own.weight, self.statistics, *node.conv.args[:3])

    def backward(self, b: Backward, grad: Pending) -> None:
        conv_backward(b, self.value, grad)


@dataclasses.dataclass(frozen=True)
class ConvolveValue(Kind):
    """The 1x1 convolution that makes `value`; `statistics`: a norm reads it, and normalises with the batch."""

    statistics: bool = False
    one_pass: bool = False  # both gradients at once, where it is narrow
    word: ClassVar[str] = "1x1 on values"

    def ops(self, program: Program) -> tuple[str, ...]:
        return ("conv1x1", "conv1x1_dgrad", "conv1x1_wgrad", *(("conv1x1_backward",) if self.one_pass else ()))

    def forward(self, f: Forward) -> None:
        node, own = f.program.maker(self.value), f.tensors[self.value]
        _convolve(f, self.value, "conv1x1", own.weight.contiguous(), self.statistics, node.conv.stride)

    def backward(self, b: Backward, grad: Pending) -> None:
        value_backward(b, self.value, as_lazy(grad), self.one_pass)


@dataclasses.dataclass(frozen=True)
class ConvolveValueAdd(Kind):
    """The addition that makes `value` and the 1x1 convolution of stride 1, read by it alone, that makes its branch.

    Both are one product.
    """

    one_pass: bool = False
    word: ClassVar[str] = "1x1 on values that adds"

    def ops(self, program: Program) -> tuple[str, ...]:
        ops = ("conv1x1_join", "conv1x1_dgrad", "conv1x1_wgrad", "norm_add_relu_backward")
        return (*ops, *(("conv1x1_backward",) if self.one_pass else ()))

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
        f.values[self.value] = f.output = out
        if add.relu:
            f.masks[self.value] = mask

    def backward(self, b: Backward, grad: Pending) -> None:
        add = b.program.maker(self.value)
        mask = b.masks.get(self.value)
        factor = b.sample_factor if add.sampled else None
        branch = as_lazy(grad._replace(mask=mask))._replace(sample_factor=factor)
        if b.wanted[add.branch]:
            value_backward(b, add.branch, branch, self.one_pass)
            if b.needs[add.branch].bias:
                options = {"mask": mask, "sample_factor": factor, "relu": add.relu, "emit_grad": False}
                _, bias, *_ = run("norm_add_relu_backward", grad.grad, **options, backend=b.backend)
                b.grads[add.branch] = b.grads[add.branch]._replace(bias=bias)
        b.give(add.other, Pending(grad.grad, grad.owned, mask=mask))
