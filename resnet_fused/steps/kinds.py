"""The kinds of steps that a program's nodes become, each with forward and backward; :mod:`..plan.lower` chooses.

========================  ============================================================================================
:class:`Convolve`         a convolution, written raw
:class:`Normalise`        batch norm of a raw tensor, as a value: its statistics are one read, and nothing is written
:class:`ConvolveAndAdd`   a convolution and the addition behind it, in its memory
:class:`Join`             batch norms of raw tensors, their sum and the ReLU: one pass
========================  ============================================================================================

Each names nodes by the values that they make, and by `ops` those of ours that it runs, forward and backward.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..backends import run
from . import conv as convolutions
from . import conv_norm
from .batch_norm import Affine, batch_affine, coefficients
from .flow import EVERY, Backward, Forward, Pending
from .folded_join import POINTWISE
from .lazy import Lazy, LazyGrad
from .program import Convolution, Normalisation
from .spec import Step, StepGrads

Tensor = torch.Tensor


def conv_backward(b: Backward, value: int, grad: Pending) -> None:
    """Gradients of a convolution's parameters and of what it read, from the one at its output (value `value`)."""
    node, own, need = b.program.maker(value), b.tensors[value], b.needs[value]
    conv, pixels = node.conv, EVERY
    read = b.tensor(node.source) if need.weight else b.like(node.source, grad.grad)
    if conv.is_pointwise(own.weight) and conv.stride != (1, 1):  # of the pixels that it reads: nobody else gets any
        read, conv, pixels = convolutions.strided(read, conv), POINTWISE, conv.stride
    grad_weight = grad_read = None
    wanted = b.wanted[node.source]
    into = b.take_to_add(node.source) if wanted and pixels == EVERY else None
    arguments = (grad.grad, read, own.weight, conv, b.backend)
    if need.weight and wanted:
        grad_weight, grad_read = convolutions.both_grads(*arguments, into)
    elif need.weight:
        grad_weight = convolutions.weight_grad(*arguments)
    elif wanted:
        grad_read = convolutions.input_grad(*arguments, into)
    bias = grad.grad.sum((0, 2, 3)) if need.bias else None
    b.grads[value] = StepGrads(grad_weight, bias)
    if grad_read is not None:
        b.give(node.source, Pending(grad_read, True, pixels))


def materialised(grad: Pending, backend: str) -> Pending:
    """A gradient as a tensor."""
    if not isinstance(grad.grad, LazyGrad):
        return grad
    return Pending(grad.grad.materialise(backend, into_g=grad.owned))


@dataclasses.dataclass(frozen=True)
class Convolve:
    """The convolution that makes `value`."""

    ops: ClassVar[tuple[str, ...]] = ()

    value: int

    def forward(self, f: Forward) -> None:
        node, own = f.program.maker(self.value), f.tensors[self.value]
        f.values[self.value] = convolutions.conv2d(f.tensor(node.source), own.weight, own.bias, node.conv)

    def backward(self, b: Backward) -> None:
        grad = b.dense(self.value)
        if grad is not None:
            conv_backward(b, self.value, materialised(grad, b.backend))


def as_step(node: Normalisation) -> Step:
    """A norm as the functions of :mod:`.conv_norm` take it."""
    return Step(POINTWISE, node.norm)


def norm_grads(b: Backward, value: int, grad: LazyGrad) -> None:
    """Note the gradients of a batch norm's parameters, the norm that makes `value`."""
    need, c = b.needs[value], grad.coefficients
    b.grads[value] = StepGrads(None, None, c.grad_gamma if need.gamma else None, c.grad_beta if need.beta else None)


def give_source(b: Backward, value: int, through: LazyGrad, owned: bool) -> None:
    """Give the source of the norm that makes `value` its gradient: as a value to a convolution, else written.

    Where the source has another reader, whose gradient is there already, both are joined in the pass that writes.
    """
    node = b.program.maker(value)
    norm_grads(b, value, through)
    if not b.wanted[node.source]:
        return
    if isinstance(b.program.maker(node.source), Convolution) and len(b.program.readers(node.source)) == 1:
        b.give(node.source, Pending(through, owned))
        return
    other = b.dense(node.source)
    total = through.materialise(b.backend, into_g=owned, residual=None if other is None else other.grad)
    b.give(node.source, Pending(total))


@dataclasses.dataclass(frozen=True)
class Normalise:
    """The batch norm that makes `value`, of a raw tensor: a convolution's output, or what came from outside."""

    ops: ClassVar[tuple[str, ...]] = (
        "bn_stats",
        "bn_affine",
        "bn_coefficients",
        "norm_add_relu",
        "norm_add_relu_backward",
        "lazy_grad_apply",
    )

    value: int

    def forward(self, f: Forward) -> None:
        node, own = f.program.maker(self.value), f.tensors[self.value]
        z, emitted = f.tensor(node.source), f.emitted.pop(node.source, None)
        if emitted is not None and node.norm.batch_stats:
            bn, statistics = batch_affine(*emitted, own, node.norm, z, f.backend)
        else:
            bn, statistics = conv_norm.normalise(z, own, as_step(node), f.backend)
        lazy = Lazy(z, bn)
        # Without a gradient to take, stock keeps what it wrote, and not what it read, which others may write to.
        f.values[self.value] = lazy if f.wanted[self.value] or not node.relu else lazy.materialise(f.backend)
        if statistics is not None:
            f.statistics.append((own, node.norm, *statistics))

    def backward(self, b: Backward) -> None:
        """Without a ReLU nothing is done: whoever read the value has given its source the gradient."""
        node, lazy = b.program.maker(self.value), b.values[self.value]
        grad = b.dense(self.value) if node.relu else None
        if grad is None:
            return
        through = conv_norm.mask_and_sum(grad.grad, lazy.z, lazy.bn, as_step(node), b.backend)
        give_source(b, self.value, through, grad.owned)


@dataclasses.dataclass(frozen=True)
class ConvolveAndAdd:
    """The addition that makes `value` and the convolution, read by it alone, that makes its branch."""

    ops: ClassVar[tuple[str, ...]] = ("norm_add_relu_backward",)

    value: int

    def forward(self, f: Forward) -> None:
        add, own = f.program.maker(self.value), f.tensors[f.program.maker(self.value).branch]
        node = f.program.maker(add.branch)
        read, other = f.tensor(node.source), f.tensor(add.other)
        out = convolutions.conv2d(read, own.weight, own.bias, node.conv)
        if add.sampled and f.sample_factor is not None:
            out.mul_(f.sample_factor.to(out.dtype).view(-1, 1, 1, 1))
        out.add_(other)
        f.values[self.value] = out.relu_() if add.relu else out

    def backward(self, b: Backward) -> None:
        add, grad = b.program.maker(self.value), b.dense(self.value)
        if grad is None:
            return
        if add.relu:
            mask = b.values[self.value]
            grad = Pending(run("norm_add_relu_backward", grad.grad, mask=mask, backend=b.backend)[0])
        branch = grad
        if add.sampled and b.sample_factor is not None:
            branch = Pending(grad.grad * b.sample_factor.to(grad.grad.dtype).view(-1, 1, 1, 1))
        if b.wanted[add.branch]:
            conv_backward(b, add.branch, branch)
        b.give(add.other, grad)


@dataclasses.dataclass(frozen=True)
class Join:
    """The addition that makes `value`, its branch a batch norm without ReLU: norms, sum and ReLU in one pass."""

    ops: ClassVar[tuple[str, ...]] = ("norm_add_relu", "norm_add_relu_backward", "bn_coefficients", "lazy_grad_apply")

    value: int

    def forward(self, f: Forward) -> None:
        add = f.program.maker(self.value)
        branch = f.values[add.branch]
        if f.program.is_affine(add.other):
            other = f.values[add.other]
            residual = (other.z, other.bn.scale, other.bn.shift)
        else:
            residual = (f.tensor(add.other), None, None)
        factor = f.sample_factor if add.sampled else None
        arguments = (branch.z, branch.bn.scale, branch.bn.shift, *residual, factor, add.relu)
        f.values[self.value] = run("norm_add_relu", *arguments, backend=f.backend)[0]

    def backward(self, b: Backward) -> None:
        add, grad = b.program.maker(self.value), b.dense(self.value)
        if grad is None:
            return
        branch, other = _normalised(b, add.branch), _normalised(b, add.other)
        factor = b.sample_factor if add.sampled else None
        options = {"mask": b.values[self.value] if add.relu else None, "relu": add.relu, "emit_grad": add.relu}
        options |= {"sample_factor": factor}
        options |= {} if branch is None else {"z": branch.z, "mean": branch.bn.mean}
        options |= {} if other is None else {"residual": other.z, "residual_mean": other.bn.mean}
        g, *sums = run("norm_add_relu_backward", grad.grad, **options, backend=b.backend)
        g = Pending(g) if add.relu else grad
        if branch is not None:
            _through_norm(b, add.branch, g._replace(owned=False), branch.bn, sums[:2], factor)
        if other is not None:
            _through_norm(b, add.other, g, other.bn, sums[2:])
        elif not b.program.is_affine(add.other):
            b.give(add.other, g)


def _normalised(b: Backward, value: int) -> Lazy | None:
    """What a batch norm without ReLU made, where it wants a gradient."""
    return b.values[value] if b.program.is_affine(value) and b.wanted[value] else None


def _through_norm(
    b: Backward, value: int, grad: Pending, bn: Affine, sums: list[Tensor], factor: Tensor | None = None
) -> None:
    """Give the source of the batch norm that makes `value` its gradient, as a tensor."""
    node, z = b.program.maker(value), b.values[value].z
    lazy = LazyGrad(grad.grad, z, coefficients(bn, *sums, z, node.norm, b.backend), bn, sample_factor=factor)
    norm_grads(b, value, lazy)
    if b.wanted[node.source]:
        b.give(node.source, Pending(lazy.materialise(b.backend, into_g=grad.owned)))


Kind = Convolve | Normalise | ConvolveAndAdd | Join
