"""Where a branch ends, on tensors: its last batch norm, what is added to it, and the ReLU.

A branch is *written* or a *Gram join*. Written, its convolution left the raw output z, whose norm is applied here, in
one pass with the sum and the ReLU; z is saved. As a Gram join its z is never written: batch norm is folded into the
convolution, which runs here (:mod:`.folded_join`). A projection is a branch of the same two kinds.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ..backends import run
from . import own_product
from .batch_norm import coefficients
from .flow import Backward, Forward
from .folded_join import TensorBranch
from .kinds import Kind, give_source, norm_ops
from .lazy import Lazy, LazyGrad, Pending
from .program import Program, Terms

#: What ``explain`` and ``tune`` call a branch that is a Gram join or not.
JOINS = {True: "Gram join", False: "plain join"}
_GRAM = ("bn_stats", "gram", "gram_norm", "gram_grad")


@dataclasses.dataclass(frozen=True)
class Join(Kind):
    """The sum that makes `value`, or the norm that does and ends the block.

    `gram`: its branch is a Gram join; `gram_other`: so is what is added to it, a projection.
    """

    gram: bool = False
    gram_other: bool = False
    packs_mask: ClassVar[bool] = False  # whether what the ReLU let pass is kept in bits; else the output tells

    @property
    def word(self) -> str:
        return JOINS[self.gram]

    def ops(self, program: Program) -> tuple[str, ...]:
        return ("norm_add_relu", "norm_add_relu_backward", "lazy_grad_apply", *self.gram_ops(program))

    def gram_ops(self, program: Program) -> tuple[str, ...]:
        """What its branches that are never written run."""
        terms = program.terms(self.value)
        norms = [program.maker(norm) for norm in [terms.branch] * self.gram + [terms.other] * self.gram_other]
        return tuple(op for norm in norms for op in (*(_GRAM if norm.norm.batch_stats else ()), *norm_ops(norm)))

    def forward(self, f: Forward) -> None:
        terms = f.program.terms(self.value)
        packs = self.packs_mask and terms.relu
        options = {"sample_factor": f.sample_factor if terms.sampled else None, "relu": terms.relu, "emit_mask": packs}
        out, mask = self.product(f, terms, options) if self.gram else self._pass(f, terms, options)
        f.output = out
        if terms.other is not None or self.gram:
            f.values[self.value] = out  # else made again from what is normalised
        if packs:
            f.masks[self.value] = mask

    def _pass(self, f: Forward | Backward, terms: Terms, options: dict) -> tuple[Tensor, Tensor]:
        """The join as one pass over the branch's raw output."""
        z, bn = f.values[terms.branch][:2]
        return run("norm_add_relu", z, bn.scale, bn.shift, **self.added(f, terms), **options, backend=f.backend)

    def added(self, f: Forward | Backward, terms: Terms) -> dict[str, Tensor]:
        """What is added: a tensor, what was written raw, or a projection that is not written before."""
        if terms.other is None:
            return {}
        if self.gram_other:
            branch = TensorBranch(f, terms.other)
            product = branch.product()
            return {"residual": own_product.add_relu(*product, None, branch.geometry, False, f.backend)}
        if not terms.projected:
            return {"residual": f.tensor(terms.other)}
        z, bn = f.values[terms.other][:2]
        return {"residual": z, "residual_scale": bn.scale, "residual_shift": bn.shift}

    def product(self, f: Forward | Backward, terms: Terms, options: dict) -> tuple[Tensor, None]:
        """The join as one convolution; a projection's branch is written first and added to in place."""
        branch = TensorBranch(f, terms.branch)
        product, args, added = branch.product(), (branch.geometry, terms.relu, f.backend), self.added(f, terms)
        out = added.get("residual")
        if "residual_scale" in added:
            affine = added["residual_scale"], added["residual_shift"]
            out, _ = run("norm_add_relu", out, *affine, relu=False, backend=f.backend)
        elif not self.gram_other:
            return own_product.add_relu(*product, out, *args), None
        own_product.add_relu_(out, *product, *args)
        return out, None

    def remade_from(self, b: Backward) -> list[object]:
        """What makes the value again where nothing is added, of what is kept; see :mod:`.remade`."""
        norm = b.program.terms(self.value).branch
        if not self.gram:
            return [b.values[norm]]
        conv = b.program.maker(norm).source
        return [b.values[b.program.maker(conv).source], b.tensors[conv], b.folded[norm].bn]

    def remade(self, b: Backward) -> Tensor:
        """The value, as forward made it."""
        terms = b.program.terms(self.value)
        options = {"sample_factor": b.sample_factor if terms.sampled else None, "relu": terms.relu}
        return (self.product if self.gram else self._pass)(b, terms, options)[0]

    def backward(self, b: Backward, grad: Pending) -> None:
        terms = b.program.terms(self.value)
        branch, other = self.written(b, terms)
        factor = b.sample_factor if terms.sampled else None
        options = {"emit_grad": terms.relu}
        if not terms.relu or terms.other is not None or self.gram:
            options["mask"] = b.values[self.value] if terms.relu else None
        else:
            options |= {"scale": branch.bn.scale, "shift": branch.bn.shift}
        masked, *sums = self.sums(b, terms, grad.grad, branch, other, options)
        g = Pending(masked) if terms.relu else grad
        if branch is not None:
            _through_norm(b, terms.branch, g if terms.other is None else g._replace(owned=False), sums, factor)
        elif self.gram and b.wanted[terms.branch]:
            TensorBranch(b, terms.branch).backward(g.grad, sums[0])
        if other is not None:
            _through_norm(b, terms.other, g, sums[2:])
        elif self.gram_other and b.wanted[terms.other]:
            total = sums[0] if factor is None else g.grad.sum((0, 2, 3), dtype=sums[0].dtype)
            TensorBranch(b, terms.other).backward(g.grad, total)
        elif terms.other is not None and not terms.projected:
            b.give(terms.other, g)

    def written(self, b: Backward, terms: Terms) -> tuple[Lazy | None, Lazy | None]:
        """The branch and the projection where they were written and want a gradient."""
        branch = b.values[terms.branch] if b.wanted[terms.branch] and not self.gram else None
        other = terms.projected and b.wanted[terms.other] and not self.gram_other
        return branch, b.values[terms.other] if other else None

    def sums(
        self, b: Backward, terms: Terms, grad: Tensor, branch: Lazy | None, other: Lazy | None, options: dict
    ) -> list[Tensor]:
        """The gradient before the ReLU, if it is to be written, and its sums for the norms of what was written."""
        options |= {"relu": terms.relu, "sample_factor": b.sample_factor if terms.sampled else None}
        options |= {} if branch is None else {"z": branch.z, "mean": branch.bn.mean}
        options |= {} if other is None else {"residual": other.z, "residual_mean": other.bn.mean}
        return run("norm_add_relu_backward", grad, **options, backend=b.backend)


def _through_norm(b: Backward, norm: int, grad: Pending, sums: list[Tensor], factor: Tensor | None = None) -> None:
    """Give the source of the batch norm that makes value `norm` its gradient, as a tensor."""
    z, bn = b.values[norm][:2]
    c = coefficients(bn, *sums[:2], z, b.program.maker(norm).norm, b.backend)
    give_source(b, norm, LazyGrad(grad.grad, z, c, bn, sample_factor=factor), grad.owned, written=True)
