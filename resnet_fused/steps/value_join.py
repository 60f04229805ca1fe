"""Where a branch ends, on values: what :mod:`.join` does, written only where it must be.

The same two kinds of branches. As a *Gram join* convolution, batch norm, residual or projection and ReLU are one
product that writes the output once (:mod:`.folded_join` has the mathematics). Its gradient g = keep*grad is never
written either: the sign bits of the output are, and readers mask on load. *Written*, z has come with its statistics,
and is normalised and added in one more pass.

Small matrices of a Gram join: one launch forward (`gram_norm`). Backward they follow the weight gradient's partial
sums, with one launch more than its own.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ..backends import run
from . import pointwise
from .batch_norm import Coefficients, coefficients
from .flow import Backward, Forward, as_lazy
from .folded_join import Branch, FoldedGrads
from .join import Join
from .kinds import give_source
from .lazy import EVERY, Lazy, LazyGrad, Pending
from .pointwise import parts
from .program import Convolution, Program, Terms
from .value_kinds import give_read, read_alone

#: Outputs for each input from which one pass and a correction move less than two: 4C against 2K + K/8 bytes a pixel in
#: 16 bits. At 2 they would move 2% less (Wide ResNet's layer1), with one more kernel.
CORRECTION_PAYS = 3


@dataclasses.dataclass(frozen=True)
class ValueJoin(Join):
    """A join of convolutions on values. `one_pass`: both gradients of the narrow 1x1 ones come from one pass."""

    one_pass: bool = False
    packs_mask: ClassVar[bool] = True

    @property
    def word(self) -> str:
        return f"{super().word} on values"

    def ops(self, program: Program) -> tuple[str, ...]:
        product = ("conv1x1_join", "conv1x1_dgrad", "conv1x1_wgrad") if self.gram else ("norm_add_relu",)
        more = ("conv1x1_backward",) if self.one_pass else ()
        sums = ("norm_add_relu_backward", "norm_relu_coefficients", "lazy_grad_apply")
        return (*product, *sums, *more, *self.gram_ops(program))

    def product(self, f: Forward | Backward, terms: Terms, options: dict) -> tuple[Tensor, Tensor]:
        """The join as one matrix product, over ``[value | x]`` where the projection is a Gram join too."""
        branch = Branch(f, terms.branch)
        value = f.values[branch.source]
        x, *applied = parts(value)
        bn, _ = branch.fold(value, branch.geometry.stride, x)
        if self.gram_other:
            projection = Branch(f, terms.other)
            read, stride = f.values[projection.source], projection.geometry.stride
            bn2, _ = projection.fold(read, stride, x)
            x2 = f.tensor(projection.source)  # nothing is applied to it on load
            options |= {"x2": x2, "stride2": stride, "weight2": projection.own.weight.contiguous()}
            options |= {"scale2": bn2.scale, "shift2": bn2.shift}
        else:
            options |= self.added(f, terms)
        weight = branch.own.weight.contiguous()
        return run("conv1x1_join", x, weight, bn.scale, bn.shift, *applied, **options, backend=f.backend)

    def backward(self, b: Backward, grad: Pending) -> None:
        terms = b.program.terms(self.value)
        mask, (branch, other) = b.masks.get(self.value), self.written(b, terms)
        found = self._coefficients(b, terms, grad.grad, branch, other, mask)
        factor = b.sample_factor if terms.sampled else None
        if terms.projected:
            self._branch(b, terms.other, other, grad.grad, mask, found[1], None)
        elif terms.other is not None:
            b.give(terms.other, Pending(grad.grad, False, mask=mask))
        self._branch(b, terms.branch, branch, grad.grad, mask, found[0], factor)

    def _coefficients(
        self, b: Backward, terms: Terms, g: Tensor, branch: Lazy | None, other: Lazy | None, mask: Tensor | None
    ) -> tuple[Coefficients | None, Coefficients | None]:
        """Of the norms of both branches where they were written: of one by itself in a launch less."""
        if branch is None and other is None:
            return None, None
        norms = [b.program.maker(norm).norm for norm in terms.norms]
        if other is None and mask is not None and norms[0].batch_stats:
            z, bn, factor = branch.z, branch.bn, b.sample_factor if terms.sampled else None
            arguments = (g, z, bn.mean, bn.rstd, bn.scale, None, mask, factor)
            sum_g, by_z, offset, grad_gamma = run("norm_relu_coefficients", *arguments, backend=b.backend)
            return Coefficients(bn.scale, by_z, offset, grad_gamma, sum_g), None
        _, *sums = self.sums(b, terms, g, branch, other, {"mask": mask, "emit_grad": False})
        of_branch = None if branch is None else coefficients(branch.bn, *sums[:2], g, norms[0], b.backend)
        return of_branch, None if other is None else coefficients(other.bn, *sums[2:], g, norms[1], b.backend)

    def _branch(self, b: Backward, norm: int, lazy: Lazy | None, g: Tensor, mask, c, factor) -> None:
        """The gradient at a branch's convolution, as a value; of a Gram join all that is behind it too."""
        if not b.wanted[norm]:
            return
        if lazy is None:
            grad = as_lazy(Pending(g, False, mask=mask))._replace(sample_factor=factor)
            ValueBranch(b, norm, grad, self.one_pass).backward()
            return
        at_conv = LazyGrad(g, lazy.z, c, lazy.bn, sample_factor=factor, mask=mask)
        give_source(b, norm, at_conv, owned=False)


class ValueBranch(Branch):
    """One on values, backward; `grad`: g. The gradient before the norm is ``scale * g``, and a correction."""

    def __init__(self, b: Backward, norm: int, grad: LazyGrad, one_pass: bool) -> None:
        super().__init__(b, norm)
        self.grad, self.wanted = grad, b.wanted[self.source]
        self.read, self.previous = read_alone(b, self.source)
        if self.previous is None:
            self.read = b.tensor(self.source)  # a correction is a product with the activation
        self.one_pass = one_pass and self._in_one_pass()

    def _in_one_pass(self) -> bool:
        """Whether both gradients should come from one pass over this one's.

        The input's is then corrected in a pass of its own, once the weight's is known: two reads of C channels, where a
        second read of the K channels of g is saved. A tensor that another convolution reads again is corrected there.
        """
        if not (self.wanted and pointwise.narrow(self.geometry, self.own.weight)):
            return False
        outputs, inputs = self.own.weight.shape[:2]
        if self.settings.batch_stats:
            return self.previous is None or outputs >= CORRECTION_PAYS * inputs
        return any(self.needs)

    def backward(self) -> None:
        b, stride, weight, other = self.flow, self.geometry.stride, self.own.weight, None
        if self.wanted and self.previous is None and stride == EVERY:
            other = b.take(self.source, corrected=True)  # the product adds it, and has a correction of its own
        scaled = self.grad._replace(coefficients=Coefficients(self.folded.bn.scale))
        grad, found = self._both(other) if self.one_pass else (scaled, self._parameters())
        correction = None if found is None else found.correction
        if self.one_pass and correction is None:
            give_read(b, self.source, grad, stride)
        elif self.one_pass and other is None and self._is_read_again():
            b.give(self.source, Pending(grad.g, True, stride, correction=correction))
        elif self.wanted:
            weight = None if self.one_pass else weight
            arguments = (grad, self.read, self.previous, weight, b.backend, stride, other, correction)
            give_read(b, self.source, pointwise.input_grad(*arguments)[0], stride)

    def _is_read_again(self) -> bool:
        """Whether a convolution whose backward is still to come reads the same tensor, and can add the correction."""
        b = self.flow
        before = [b.program.maker(reader) for reader in b.program.readers(self.source) if reader < self.conv]
        return isinstance(b.values[self.source], Tensor) and any(isinstance(node, Convolution) for node in before)

    def _both(self, other: Pending | None) -> tuple[Tensor | LazyGrad, FoldedGrads]:
        """The one pass; the input's gradient still lacks a correction with batch statistics."""
        b, complete, scale = self.flow, not self.settings.batch_stats, self.folded.bn.scale
        path = other if complete else None
        arguments = (self.grad, self.read, self.previous, self.own.weight, b.backend, path, scale, complete)
        grad, product, sum_g = pointwise.both_grads(*arguments)
        found = self.parameter_grads(product, sum_g, self.grad.g, self.folded)
        self.note(found.weight, None, found.gamma, sum_g)
        return grad, found

    def _parameters(self) -> FoldedGrads | None:
        """Gradients of the parameters, and the correction of the input's."""
        b, weight, batch_stats = self.flow, self.own.weight, self.settings.batch_stats
        if not (any(self.needs) or (self.wanted and batch_stats)):
            return None
        (bn, gram), join = self.folded, {}
        if batch_stats:
            join = {"join_weight": weight.contiguous(), "join_scale": bn.scale, "join_rstd": bn.rstd} | gram._asdict()
        arguments = (self.grad, b.values[self.source], b.backend, self.geometry.stride)
        product, sum_g, *more = pointwise.weight_grad(*arguments, **join)
        if batch_stats:
            found = FoldedGrads(product.view(weight.shape), more[0], tuple(more[1:]))
        else:
            found = self.parameter_grads(product, sum_g, self.grad.g, self.folded)
        self.note(found.weight, None, found.gamma, sum_g)
        return found
