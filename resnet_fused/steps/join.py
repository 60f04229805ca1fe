"""Where a branch ends, on tensors: its last batch norm, what is added to it, and the ReLU.

A branch is *written* or a *Gram join*. Written, its convolution left the raw output z, whose norm is applied here, in
one pass with the sum and the ReLU; z is saved. As a Gram join its z is never written: batch norm is folded into the
convolution, which runs here (:mod:`.folded_join`). A projection is a branch of the same two kinds.
"""

from __future__ import annotations

import dataclasses

import torch

from ..backends import run
from . import folded_join
from .batch_norm import coefficients
from .conv import strided
from .flow import Backward, Forward, merged
from .folded_join import POINTWISE
from .kinds import norm_grads, norm_ops
from .lazy import EVERY, Lazy, LazyGrad, Pending
from .program import Normalisation, Program, Terms
from .spec import Step, StepGrads

Tensor = torch.Tensor
_GRAM = ("bn_stats", "gram", "gram_norm", "gram_grad")


def gram_ops(norm: Normalisation) -> tuple[str, ...]:
    """What a branch that is never written runs."""
    return (*(_GRAM if norm.norm.batch_stats else ()), *norm_ops(norm))


def join_ops(program: Program, value: int, gram: bool, gram_other: bool) -> tuple[str, ...]:
    """What its Gram joins run."""
    terms = program.terms(value)
    ops = gram_ops(program.maker(terms.branch)) if gram else ()
    return (*ops, *gram_ops(program.maker(terms.other))) if gram_other else ops


@dataclasses.dataclass(frozen=True)
class Join:
    """The sum that makes `value`, or the norm that does and ends the block.

    `gram`: its branch is a Gram join; `gram_other`: so is what is added to it, a projection.
    """

    value: int
    gram: bool = False
    gram_other: bool = False

    def ops(self, program: Program) -> tuple[str, ...]:
        passes = ("norm_add_relu", "norm_add_relu_backward", "lazy_grad_apply")
        return (*passes, *join_ops(program, self.value, self.gram, self.gram_other))

    def forward(self, f: Forward) -> None:
        terms = f.program.terms(self.value)
        branch = _Folding(f, terms.branch) if self.gram else None
        other = _Folding(f, terms.other) if self.gram_other else None
        out = _pass(f, terms, other) if branch is None else _product(f, terms, branch, other)
        f.output = out
        if terms.other is not None or self.gram:
            f.values[self.value] = out  # the mask of the ReLU; else made again from what is normalised

    def backward(self, b: Backward) -> None:
        terms, grad = b.program.terms(self.value), b.dense(self.value)
        if grad is None:
            return
        branch = b.values[terms.branch] if b.wanted[terms.branch] and not self.gram else None
        is_norm = terms.other is not None and b.program.is_affine(terms.other)
        other = b.values[terms.other] if is_norm and b.wanted[terms.other] and not self.gram_other else None
        factor = b.sample_factor if terms.sampled else None
        g, sums = self._masked(b, terms, grad, branch, other, factor)
        if self.gram:
            _through_gram(b, terms.branch, g.grad, sums[0])
        elif branch is not None:
            _through_norm(b, terms.branch, g if terms.other is None else g._replace(owned=False), sums, factor)
        if self.gram_other:
            total = sums[0] if factor is None else g.grad.sum((0, 2, 3), dtype=sums[0].dtype)
            _through_gram(b, terms.other, g.grad, total)
        elif other is not None:
            _through_norm(b, terms.other, g, sums[2:])
        elif terms.other is not None and not is_norm:
            b.give(terms.other, g)

    def _masked(
        self, b: Backward, terms: Terms, grad: Pending, branch: Lazy | None, other: Lazy | None, factor: Tensor | None
    ) -> tuple[Pending, list[Tensor]]:
        """The gradient before the ReLU, and its sums for the norms of what was written."""
        options = {"relu": terms.relu, "emit_grad": terms.relu, "sample_factor": factor}
        options |= {} if branch is None else {"z": branch.z, "mean": branch.bn.mean}
        options |= {} if other is None else {"residual": other.z, "residual_mean": other.bn.mean}
        if not terms.relu or terms.other is not None or self.gram:
            options["mask"] = b.values[self.value] if terms.relu else None
        else:
            options |= {"scale": branch.bn.scale, "shift": branch.bn.shift}
        g, *sums = run("norm_add_relu_backward", grad.grad, **options, backend=b.backend)
        return Pending(g) if terms.relu else grad, sums


class _Folding:
    """A branch that is not written: batch norm of its convolution, from what that reads."""

    def __init__(self, f: Forward, norm: int) -> None:
        node = f.program.maker(norm)
        self.conv, self.own = f.program.maker(node.source).conv, merged(f.tensors, node.source, norm)
        source = f.program.maker(node.source).source
        value, self.read = f.values[source], f.tensor(source)
        a, centre = self.read, None
        if node.norm.batch_stats:
            a = strided(a, self.conv)
            centre = value.bn.centre if isinstance(value, Lazy) else None
            centre = folded_join.sample_mean(a, f.backend) if centre is None else centre
        self.folded, statistics = folded_join.fold(a, self.own, Step(self.conv, node.norm), centre, f.backend)
        f.folded[norm] = self.folded
        f.note(norm, statistics)

    @property
    def product(self) -> tuple:
        """Input, weight and shift of the convolution that is the branch."""
        weight = folded_join.scaled(self.own.weight, self.folded.bn.scale)
        return self.read, weight, folded_join.shift_of(self.folded, self.own)


def _product(f: Forward, terms: Terms, branch: _Folding, other: _Folding | None) -> Tensor:
    """The join as one convolution; a projection's branch is written first and added to in place."""
    args, backend = branch.conv.args, f.backend
    if other is None and (terms.other is None or not f.program.is_affine(terms.other)):
        residual = None if terms.other is None else f.tensor(terms.other)
        return run("conv_add_relu", *branch.product, residual, *args, terms.relu, backend=backend)
    if other is not None:
        out = run("conv_add_relu", *other.product, None, *other.conv.args, backend=backend)
    else:
        z, bn = f.values[terms.other][:2]
        out, _ = run("norm_add_relu", z, bn.scale, bn.shift, relu=False, backend=backend)
    run("conv_add_relu_", out, *branch.product, *args, terms.relu, backend=backend)
    return out


def _pass(f: Forward, terms: Terms, other: _Folding | None) -> Tensor:
    """The join as one pass over the branch's raw output."""
    residual = (None, None, None)
    if other is not None:
        residual = (run("conv_add_relu", *other.product, None, *other.conv.args, backend=f.backend), None, None)
    elif terms.other is not None and f.program.is_affine(terms.other):
        z, bn = f.values[terms.other][:2]
        residual = (z, bn.scale, bn.shift)
    elif terms.other is not None:
        residual = (f.tensor(terms.other), None, None)
    z, bn = f.values[terms.branch][:2]
    factor = f.sample_factor if terms.sampled else None
    return run("norm_add_relu", z, bn.scale, bn.shift, *residual, factor, terms.relu, backend=f.backend)[0]


def _through_norm(b: Backward, norm: int, grad: Pending, sums: list[Tensor], factor: Tensor | None = None) -> None:
    """Give the source of the batch norm that makes value `norm` its gradient, as a tensor."""
    node, (z, bn, _) = b.program.maker(norm), b.values[norm]
    lazy = LazyGrad(grad.grad, z, coefficients(bn, *sums[:2], z, node.norm, b.backend), bn, sample_factor=factor)
    norm_grads(b, norm, lazy)
    if b.wanted[node.source]:
        b.give(node.source, Pending(lazy.materialise(b.backend, into_g=grad.owned and b.in_place)))


def _through_gram(b: Backward, norm: int, g: Tensor, sum_g: Tensor) -> None:
    """Gradients of a branch that was never written, and of what its convolution read."""
    node = b.program.maker(norm)
    if not b.wanted[norm]:
        return
    conv = b.program.maker(node.source)
    need, value = needs_of(b, node.source, norm), b.values[conv.source]
    ours = isinstance(value, Lazy) and value.written is None and len(b.program.readers(conv.source)) == 1
    read, geometry, pixels = b.tensor(conv.source), conv.conv, EVERY
    if geometry.is_pointwise(b.tensors[node.source].weight) and geometry.stride != (1, 1):
        read, geometry, pixels = strided(read, geometry), POINTWISE, geometry.stride
    own, step = merged(b.tensors, node.source, norm), Step(conv.conv, node.norm)
    grad_read, grads = folded_join.backward(
        g, sum_g, read, own, step, b.folded[norm], b.backend, need, b.wanted[conv.source], geometry, owned=ours
    )
    note_grads(b, node.source, norm, grads)
    if grad_read is not None:
        b.give(conv.source, Pending(grad_read, True, pixels))


def needs_of(b: Backward, conv: int, norm: int) -> StepGrads:
    """What of a convolution's and its norm's tensors wants a gradient."""
    return StepGrads(*b.needs[conv][:2], *b.needs[norm][2:])


def note_grads(b: Backward, conv: int, norm: int, grads: StepGrads) -> None:
    """Note the gradients of a convolution and of its norm."""
    b.grads[conv], b.grads[norm] = StepGrads(*grads[:2]), StepGrads(None, None, *grads[2:])
