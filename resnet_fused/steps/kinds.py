"""The kinds of steps that a program's nodes become, each with forward and backward; :mod:`..plan.lower` chooses.

Those here run on tensors, by ATen's and oneDNN's convolutions, as does :class:`.join.Join`, where a branch ends. Those
on values, by 1x1 kernels that normalise on load, are in :mod:`.value_kinds` and :mod:`.value_join`. Each names nodes by
the values that they make, and says by `ops` which of our ops it runs, forward and backward.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ..backends import run
from ..ops import stat_dtype
from . import batch_norm, stem
from . import conv as convolutions
from .batch_norm import Coefficients, coefficients
from .flow import Backward, Forward
from .lazy import EVERY, Lazy, LazyGrad, Pending
from .program import Convolution, Normalisation, Program
from .spec import Conv, StepGrads


@dataclasses.dataclass(frozen=True)
class Kind:
    """A step; `value`: what it makes."""

    word: ClassVar[str]  # what ``explain`` calls it
    value: int

    def ops(self, program: Program) -> tuple[str, ...]:
        """Our ops over activations that it runs, forward and backward; some that a call may not need are counted in."""
        raise NotImplementedError

    def forward(self, f: Forward) -> None:
        raise NotImplementedError

    def backward(self, b: Backward, grad: Pending) -> None:
        """Give the sources of the value their gradients, from its own."""
        raise NotImplementedError


def conv_backward(b: Backward, value: int, grad: Pending) -> None:
    """Gradients of a convolution's parameters and of what it read, from the one at its output (value `value`)."""
    node, own, need = b.program.maker(value), b.tensors[value], b.needs[value]
    if isinstance(grad.grad, LazyGrad):
        grad = Pending(grad.grad.materialise(b.backend, into_g=grad.owned and b.in_place))
    conv, pixels = node.conv, EVERY
    if conv.is_pointwise(own.weight) and conv.stride != (1, 1) and not b.in_place:
        return _strided_backward(b, value, grad.grad)
    read = b.tensor(node.source) if need.weight else b.like(node.source, grad.grad)
    if conv.is_pointwise(own.weight) and conv.stride != (1, 1):  # of the pixels that it reads: nobody else gets any
        read, conv, pixels = convolutions.strided(read, conv.stride), convolutions.POINTWISE, conv.stride
    wanted = b.wanted[node.source]
    into = b.take_to_add(node.source) if wanted and pixels == EVERY else None
    grad_read = conv_grads(b, value, grad.grad, read, conv, into)
    if grad_read is not None:
        b.give(node.source, Pending(grad_read, True, pixels))


def _strided_backward(b: Backward, value: int, grad: Tensor) -> None:
    """:func:`conv_backward` of a 1x1 with a stride on a GPU, whose weight's gradient reads pixels where they lie."""
    node, weight, need = b.program.maker(value), b.tensors[value].weight, b.needs[value]
    if b.wanted[node.source]:
        shape = (grad.shape[0], weight.shape[1], *grad.shape[2:])
        like = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        found = convolutions.gradients(grad, like, weight, convolutions.POINTWISE, b.backend, (True, False))
        b.give(node.source, Pending(found[0], True, node.conv.stride))
    read = b.tensor(node.source) if need.weight else grad
    found = convolutions.gradients(grad, read, weight, node.conv, b.backend, (False, bool(need.weight)))
    b.grads[value] = StepGrads(found[1], grad.sum((0, 2, 3), dtype=stat_dtype(grad.dtype)) if need.bias else None)


def conv_grads(
    b: Backward, value: int, grad: Tensor, read: Tensor, conv: Conv, into: Tensor | None = None
) -> Tensor | None:
    """Note the gradients of the parameters of the convolution that makes `value`; that of what it read, if wanted.

    `read`: as `conv` reads it. `into`: a tensor that is ours alone, to which that gradient is added.
    """
    own, need, wanted = b.tensors[value], b.needs[value], b.wanted[b.program.maker(value).source]
    settings = (conv, b.backend, (wanted, bool(need.weight)), into, b.program.precision)
    grad_read, grad_weight = convolutions.gradients(grad, read, own.weight, *settings)
    bias = grad.sum((0, 2, 3), dtype=stat_dtype(grad.dtype)) if need.bias else None
    b.grads[value] = StepGrads(grad_weight, bias)
    return grad_read


@dataclasses.dataclass(frozen=True)
class Convolve(Kind):
    """The convolution that makes `value`. `keeps`: the activation written for it stays until backward.

    `statistics`: a norm reads it, and normalises with the batch; some kernels emit what that needs.
    """

    keeps: bool = False
    statistics: bool = False
    word: ClassVar[str] = "convolution"

    def ops(self, program: Program) -> tuple[str, ...]:
        return ("norm_add_relu",) if program.is_lazy(program.maker(self.value).source) else ()

    def forward(self, f: Forward) -> None:
        node, own = f.program.maker(self.value), f.tensors[self.value]
        read = f.tensor(node.source)
        if self.keeps and isinstance(f.values[node.source], Lazy):
            f.values[node.source] = f.values[node.source]._replace(written=read)
        arguments = (read, own.weight, own.bias, node.conv, f.backend, self.statistics, f.program.precision)
        f.values[self.value], moments = convolutions.conv2d(*arguments)
        if moments is not None:
            f.emitted[self.value] = moments

    def backward(self, b: Backward, grad: Pending) -> None:
        conv_backward(b, self.value, grad)


def norm_ops(norm: Normalisation) -> tuple[str, ...]:
    """What a batch norm itself may run, forward and backward, beside who emits its statistics."""
    return ("bn_affine", "bn_coefficients") if norm.norm.batch_stats else ("running_affine",)


def norm_grads(b: Backward, value: int, c: Coefficients) -> None:
    """Note the gradients of a batch norm's parameters, the norm that makes `value`."""
    need = b.needs[value]
    b.grads[value] = StepGrads(None, None, c.grad_gamma if need.gamma else None, c.grad_beta if need.beta else None)


def give_source(b: Backward, value: int, through: LazyGrad, owned: bool, written: bool = False) -> None:
    """Give the source of the norm that makes `value` its gradient: as a value to a convolution, else `written`.

    Where the source has another reader, whose gradient is there already, both are joined in the pass that writes.
    """
    node = b.program.maker(value)
    norm_grads(b, value, through.coefficients)
    if not b.wanted[node.source]:
        return
    is_conv = isinstance(b.program.maker(node.source), Convolution)
    if not written and is_conv and len(b.program.readers(node.source)) == 1:
        b.give(node.source, Pending(through, owned))
        return
    other = b.dense(node.source)
    total = through.materialise(b.backend, into_g=owned and b.in_place, residual=None if other is None else other.grad)
    b.give(node.source, Pending(total))


def normalised(f: Forward, value: int) -> Lazy:
    """The batch norm that makes `value` as a value, from statistics that are known or from a read of what it reads."""
    node, own = f.program.maker(value), f.tensors[value]
    z, emitted = f.tensor(node.source), f.emitted.get(node.source)
    if value in f.affine:
        bn, statistics = f.affine.pop(value)
    elif emitted is not None and node.norm.batch_stats:
        bn, statistics = batch_norm.batch_affine(*emitted, own, node.norm, z, f.backend)
    else:
        bn, statistics = batch_norm.normalise(z, own, node.norm, f.backend)
    f.note(value, statistics)
    return Lazy(z, bn)


@dataclasses.dataclass(frozen=True)
class Normalise(Kind):
    """The batch norm that makes `value`, of a raw tensor: a convolution's output, or what came from outside.

    As a value: its statistics are one read, and nothing is written.
    """

    emitted: bool = False  # whether the kernel that wrote the tensor emits its statistics; from outside it may anyway
    word: ClassVar[str] = "norm on load"

    def ops(self, program: Program) -> tuple[str, ...]:
        node = program.maker(self.value)
        reads = ("bn_stats",) if node.norm.batch_stats and not self.emitted else ()
        sums = "norm_relu_coefficients" if node.norm.batch_stats else "norm_add_relu_backward"
        passes = (sums, "lazy_grad_apply") if node.relu else ()
        return (*reads, *norm_ops(node), *passes)

    def forward(self, f: Forward) -> None:
        node, lazy = f.program.maker(self.value), normalised(f, self.value)
        # Without a gradient to take, stock keeps what it wrote, and not what it read, which others may write to.
        writes = node.relu and not f.wanted[self.value] and self.value != f.program.output
        f.values[self.value] = lazy.materialise(f.backend) if writes else lazy

    def backward(self, b: Backward, grad: Pending) -> None:
        """Not called where something joins or pools the value: it has given its source the gradient."""
        norm, (z, bn, _) = b.program.maker(self.value).norm, b.values[self.value]
        c = Coefficients(bn.scale)  # all there is where a frozen norm's parameters want no gradient
        if norm.batch_stats:  # two reads, no write
            arguments = (grad.grad, z, bn.mean, bn.rstd, bn.scale, bn.shift)
            sum_g, by_z, offset, grad_gamma = run("norm_relu_coefficients", *arguments, backend=b.backend)
            c = Coefficients(bn.scale, by_z, offset, grad_gamma, sum_g)
        elif any(b.needs[self.value]):
            arguments = (grad.grad, z, bn.mean, bn.scale, bn.shift)
            _, *sums = run("norm_add_relu_backward", *arguments, emit_grad=False, backend=b.backend)
            c = coefficients(bn, *sums[:2], z, norm, b.backend)
        give_source(b, self.value, LazyGrad(grad.grad, z, c, bn, relu=True), grad.owned)


@dataclasses.dataclass(frozen=True)
class ConvolveAndAdd(Kind):
    """The addition that makes `value` and the convolution, read by it alone, that makes its branch.

    The sum is a pass of its own, in place: oneDNN's convolution with a binary post-op takes longer than both.
    `statistics`: of the sum too, which a norm is to read; not with a ReLU.
    """

    statistics: bool = False

    @property
    def word(self) -> str:
        return "convolution and sum" + (" with its statistics" if self.statistics else "")

    def ops(self, program: Program) -> tuple[str, ...]:
        passes = ("norm_add_relu_backward",) if program.maker(self.value).relu else ()
        return (*passes, "add_stats_") if self.statistics else passes

    def forward(self, f: Forward) -> None:
        add, own = f.program.maker(self.value), f.tensors[f.program.maker(self.value).branch]
        node = f.program.maker(add.branch)
        read, other = f.tensor(node.source), f.tensor(add.other)
        factor = f.sample_factor if add.sampled else None
        out, _ = convolutions.conv2d(read, own.weight, own.bias, node.conv, f.backend, False, f.program.precision)
        if self.statistics:
            f.emitted[self.value] = run("add_stats_", out, other, factor, backend=f.backend)
        else:
            out = out if factor is None else out.mul_(factor.to(out.dtype).view(-1, 1, 1, 1))
            out = out.add_(other).relu_() if add.relu else out.add_(other)
        f.values[self.value] = f.output = out

    def backward(self, b: Backward, grad: Pending) -> None:
        add = b.program.maker(self.value)
        if add.relu:
            mask = b.values[self.value]
            grad = Pending(run("norm_add_relu_backward", grad.grad, mask=mask, backend=b.backend)[0])
        branch = grad
        if add.sampled and b.sample_factor is not None:
            branch = Pending(grad.grad * b.sample_factor.to(grad.grad.dtype).view(-1, 1, 1, 1))
        if b.wanted[add.branch]:
            conv_backward(b, add.branch, branch)
        b.give(add.other, grad)


def pooled_norm_grads(b: Backward, value: int, op: str, read: tuple[Tensor, ...], settings: tuple) -> tuple:
    """Note the parameters' gradients of the norm with ReLU that makes `value`, and whose pool is `op`.

    `read`: the gradient behind the pool, what else the pool's backward reads, and what the norm read. Returned: what
    the ``apply`` of `op` takes before `settings`.
    """
    bn = b.values[value].bn
    sums = run(f"{op}_backward", *read, bn.mean, bn.scale, bn.shift, *settings, backend=b.backend)
    c = coefficients(bn, *sums, read[-1], b.program.maker(value).norm, b.backend)
    norm_grads(b, value, c)
    return *read, c.a, c.b, c.d, bn.scale, bn.shift


@dataclasses.dataclass(frozen=True)
class PooledNorm(Kind):
    """The end of a stem: the pool that makes `value`, of a norm with ReLU, which has a step of its own before.

    Batch norm, ReLU and pool are one pass; what lies between is never written. Backward the gradient reaches the stem's
    convolution from the pool's output, through nothing of the size between.
    """

    word: ClassVar[str] = "norm, ReLU and pool in one pass"

    def ops(self, program: Program) -> tuple[str, ...]:
        return "norm_relu_pool", "norm_relu_pool_backward", "norm_relu_pool_apply"

    def forward(self, f: Forward) -> None:
        node = f.program.maker(self.value)
        z, bn = f.values[node.source][:2]
        out, winners = run("norm_relu_pool", z, bn.scale, bn.shift, *node.pool.args, backend=f.backend)
        f.values[self.value] = f.output = out
        f.winners[self.value] = winners

    def backward(self, b: Backward, grad: Pending) -> None:
        node = b.program.maker(self.value)
        norm, read = b.program.maker(node.source), (grad.grad, b.winners[self.value], b.values[node.source].z)
        pooled = pooled_norm_grads(b, node.source, "norm_relu_pool", read, node.pool.args)
        if b.wanted[norm.source]:
            if _ends_in_weight(b, norm.source):
                conv, own = b.program.maker(norm.source), b.tensors[norm.source]
                arguments = (pooled, b.tensor(conv.source), own.weight, conv.conv, node.pool, b.backend)
                b.grads[norm.source] = StepGrads(stem.pooled_weight_grad(*arguments))
                return
            dz = run("norm_relu_pool_apply", *pooled, *node.pool.args, backend=b.backend)
            b.give(norm.source, Pending(dz))


def _ends_in_weight(b: Backward, value: int) -> bool:
    """Whether of the gradient of `value` nothing is wanted but that of a weight, which :mod:`.stem` has."""
    node, need = b.program.maker(value), b.needs[value]
    alone = isinstance(node, Convolution) and len(b.program.readers(value)) == 1 and not b.wanted[node.source]
    if not alone or not need.weight or need.bias:
        return False
    z = b.values[b.program.readers(value)[0]].z
    return stem.takes_gradient(b.like(node.source, z), b.tensors[value].weight, node.conv, b.backend)
