"""Frozen batch norm in training on GPUs: one launch from what a convolution reads to what is behind its norm.

With running statistics scale and shift are known before the product, so the raw output is never written, read or saved:
`conv_join`, or, of 1x1 convolutions that the 1x1 ops take, `conv1x1_join` writes the activation, which the next
convolution keeps, and the bits of its ReLU. Backward one pass masks and scales the gradient for PyTorch's 3x3, in the
place of sums, of that pass over two tensors, and of one that writes the activation again; the 1x1 ops do it on load.

Where the norm's parameters want no gradient (torchvision's FrozenBatchNorm2d), the norm is a scale in the gradient of
its convolution. Where they do, theirs follow from the weight's, as of any branch that was never written
(:mod:`.folded_join`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ..backends import run
from .batch_norm import Coefficients
from .conv import POINTWISE, gradients
from .flow import Backward, Forward, as_lazy
from .folded_join import Branch, scaled_weight
from .kinds import conv_backward
from .lazy import EVERY, LazyGrad, Pending
from .program import Program, Terms
from .value_join import ValueBranch, ValueJoin
from .value_kinds import value_backward


@dataclasses.dataclass(frozen=True)
class FrozenJoin(ValueJoin):
    """The sum that makes `value`, or the norm that does, anywhere in a program; the norms that are joined are frozen.

    `joins`: forward is `conv1x1_join`, with a projection, else `conv_join`. `by_ones`: the norms whose convolutions'
    gradients are by the 1x1 ops. `packs_mask`: the ReLU leaves bits; where not, a 1x1 convolution alone reads the
    value, and takes its gradient through the ReLU (:func:`.value_kinds.read_alone`).
    """

    joins: bool = False
    by_ones: tuple[int, ...] = ()
    packs_mask: bool = True
    word: ClassVar[str] = "convolution"

    def ops(self, program: Program) -> tuple[str, ...]:
        ones = ("conv1x1_dgrad", "conv1x1_wgrad", *(("conv1x1_backward",) if self.one_pass else ()))
        products = ("conv1x1_join" if self.joins else "conv_join", *(ones if self.by_ones else ()))
        return (*products, "norm_add_relu_backward", "lazy_grad_apply", *self.gram_ops(program))

    def product(self, f: Forward | Backward, terms: Terms, options: dict) -> tuple[Tensor, Tensor]:
        if self.joins:
            return super().product(f, terms, options)
        return _convolve(f, terms.branch, **self.added(f, terms), **options)

    def added(self, f: Forward | Backward, terms: Terms) -> dict[str, Tensor]:
        if self.joins or not terms.projected:
            return super().added(f, terms)
        return {"residual": _convolve(f, terms.other, relu=False)[0]}

    def backward(self, b: Backward, grad: Pending) -> None:
        terms, sum_g = b.program.terms(self.value), b.through.get(self.value)
        behind = Pending(grad.grad, False, mask=b.masks.get(self.value))
        if terms.projected:
            self._branch_grads(b, terms.other, as_lazy(behind), sum_g)
        elif terms.other is not None:
            b.give(terms.other, behind)
        factor = b.sample_factor if terms.sampled else None
        self._branch_grads(b, terms.branch, as_lazy(behind)._replace(sample_factor=factor), sum_g)

    def _branch_grads(self, b: Backward, norm: int, grad: LazyGrad, sum_g: Tensor | None) -> None:
        """Gradients of a branch, which ends in `norm`, from the one behind that. `sum_g`: of it, where it is known."""
        if not b.wanted[norm]:
            return
        branch, ones = _FrozenBranch(b, norm), norm in self.by_ones
        before = grad._replace(coefficients=Coefficients(branch.folded.bn.scale))
        if ones and branch.wants_sums:
            ValueBranch(b, norm, grad, self.one_pass).backward()
        elif ones:
            value_backward(b, branch.conv, before, self.one_pass)
        elif branch.wants_sums or (grad.mask is None and grad.sample_factor is None):
            branch.backward(grad, sum_g)
        else:
            conv_backward(b, branch.conv, Pending(before, False))


def _convolve(f: Forward | Backward, norm: int, **options) -> tuple[Tensor, Tensor]:
    """The branch that ends in `norm`, in one launch, and what else `conv_join` is asked for."""
    branch = Branch(f, norm)
    read, where = f.tensor(branch.source), zip(("stride", "padding", "dilation"), branch.geometry.args, strict=False)
    bn, _ = branch.fold(read)
    return run(
        "conv_join", read, branch.own.weight, bn.scale, branch.shift, **dict(where), **options, backend=f.backend
    )


class _FrozenBranch(Branch):
    """One whose gradients are PyTorch's, backward."""

    @property
    def wants_sums(self) -> bool:
        """Whether bias, gamma or beta wants a gradient."""
        return any(self.needs[1:])

    def backward(self, grad: LazyGrad, sum_g: Tensor | None) -> None:
        """The scale is in the weight, and in the weight's gradient: no pass over the gradient is needed for it."""
        b, need, weight, scale, found = self.flow, self.needs, self.own.weight, self.folded.bn.scale, None
        g, sum_g = self._written(grad, sum_g)
        if need.weight or need.gamma:
            settings = (g, b.tensor(self.source), weight, self.geometry, self.backend, (False, True))
            found = self.parameter_grads(gradients(*settings)[1], sum_g, g, self.folded)
        self.note(found and found.weight, scale * sum_g if need.bias else None, found and found.gamma, sum_g)
        if not b.wanted[self.source]:
            return
        read, conv, pixels = b.like(self.source, g), self.geometry, EVERY
        if conv.is_pointwise(weight) and conv.stride != EVERY:  # of the pixels that it reads: nobody else gets any
            shape, conv, pixels = (g.shape[0], weight.shape[1], *g.shape[2:]), POINTWISE, conv.stride
            read = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
        into = b.take_to_add(self.source) if pixels == EVERY else None
        settings = (g, read, scaled_weight(weight, scale), conv, self.backend, (True, False), into, b.program.precision)
        b.give(self.source, Pending(gradients(*settings)[0], True, pixels))

    def _written(self, grad: LazyGrad, sum_g: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradient behind the norm as a tensor, and its sum where one is wanted."""
        op, (g, mask, factor) = "norm_add_relu_backward", (grad.g, grad.mask, grad.sample_factor)
        if mask is not None and factor is None:
            return tuple(run(op, g, mask=mask, backend=self.backend)[:2])
        g = g if mask is None and factor is None else grad.materialise(self.backend)
        if sum_g is None and self.wants_sums:
            sum_g = run(op, g, relu=False, emit_grad=False, backend=self.backend)[1]
        return g, sum_g
