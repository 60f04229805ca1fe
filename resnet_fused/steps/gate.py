"""A gate: a value times a factor for each sample and channel, which others make of its means over pixels.

``out = relu(y * factor + residual)``, ``factor = opaque(mean(y))``: squeeze-and-excitation (Hu et al. 2018,
https://arxiv.org/abs/1709.01507) and its kin. What makes the factor is opaque: stock modules on a few numbers, called
where stock calls them, between two nodes of autograd. :func:`squeeze` hands out y, under a name that only the gate
reads, and its means; :func:`gate` is the product, the sum and the ReLU in one pass.

Backward, the product's gradient ``factor * g`` is not written by itself. The gate hands `g`, the residual's gradient
too, and the factor to the squeeze, as gradients of two further results that have no other use (:class:`Link`). The
squeeze, whose means have their gradient by then, writes ``factor * g + grad_mean / pixels`` in one pass. Where
PyTorch's own operations must run (a gradient to be differentiated, or a batch of them), the gate gives y its gradient.

The factor's gradient reads y, which the gate keeps, or makes again from what the program keeps that made it
(:mod:`.remade`). What is differentiated then is y by another name: a result of the squeeze that takes no memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import bounds, run
from ..ops import stat_dtype
from ..ops.contract import channels_last
from . import remade
from .layout import Placed, is_transformed, worked_on
from .saved import Source, layouts_of, unpacked


class Link(NamedTuple):
    """Results of a squeeze that have gradients and no values."""

    masked: Tensor  # [N, C, H, W]
    factor: Tensor  # [N, C]
    zeros: Tensor | None  # [N, C, H, W], in the memory of one: y as autograd knows it, where its values are made again


class _Squeeze(torch.autograd.Function):
    """y, its means over pixels, and the link. `remakes`: whether the gate makes y again."""

    @staticmethod
    def forward(ctx, y: Tensor, backend: str, remakes: bool) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.backend = y.shape, backend
        zeros = y.new_zeros(()).expand(y.shape) if remakes else None
        link = y.view_as(y), y.new_empty(y.shape[:2], dtype=stat_dtype(y.dtype)), zeros
        return y.view_as(y), y.mean((2, 3), keepdim=True), *link

    @staticmethod
    def backward(
        ctx,
        grad: Tensor | None,
        grad_mean: Tensor | None,
        masked: Tensor | None,
        factor: Tensor | None,
        again: Tensor | None,
    ):
        pixels = ctx.shape[2] * ctx.shape[3]
        if again is not None:
            grad = again if grad is None else grad + again
        if masked is not None:
            term = None if grad_mean is None else grad_mean.flatten(1).to(factor.dtype).contiguous() / pixels
            through = run("gate_add_relu", masked, factor, term, relu=False, backend=ctx.backend)
        else:
            through = None if grad_mean is None else (grad_mean / pixels).expand(ctx.shape)
        if grad is None or through is None:
            return grad if through is None else through, None, None
        return grad + through, None, None


class _Gate(torch.autograd.Function):
    """The product of a squeezed y and its factor, a sum and a ReLU. `again`: what makes y, and the link's zeros."""

    @staticmethod
    def forward(
        ctx,
        y: Tensor,
        masked: Tensor | None,
        link: Tensor | None,
        factor: Tensor,
        residual: Tensor | None,
        relu: bool,
        backend: str,
        again: tuple[Source, Tensor] | None,
    ) -> Tensor:
        out = run("gate_add_relu", y, factor, None, residual, relu, backend=backend)
        ctx.backend, ctx.facts, ctx.zeros = backend, None, None
        kept = [y]
        if again is not None:
            (ctx.facts, kept), ctx.zeros = again
            ctx.layouts = layouts_of(kept)
        ctx.save_for_backward(factor, out if relu else None, *kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        factor, out, *kept = ctx.saved_tensors
        y = kept[0] if ctx.facts is None else remade.make(ctx.facts, unpacked(kept, ctx.layouts))
        adds = ctx.needs_input_grad[4]
        if torch.is_grad_enabled() or is_transformed(grad):
            y = y + ctx.zeros if ctx.facts is not None and torch.is_grad_enabled() else y
            g = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
            wide = g.to(factor.dtype)
            product = (wide * factor[:, :, None, None]).to(g.dtype)
            sums = (wide * y.to(factor.dtype)).sum((2, 3))
            return product, None, None, sums, g if adds else None, *_REST
        out = None if out is None else channels_last(out)
        g, sums = run("gate_add_relu_backward", channels_last(grad), channels_last(y), out, backend=ctx.backend)
        return None, g, factor, sums, g if adds else None, *_REST


_REST = (None, None, None)  # of arguments that are no tensors


class Gated(NamedTuple):
    """A value times its factor, which is not written yet."""

    y: Placed
    link: Link | None  # None: y wants no gradient
    factor: Tensor  # [N, C], in the dtype of statistics
    backend: str
    owned: bool = False  # whether nobody else reads y, which may be written over where nobody wants a gradient

    def written(self) -> Placed:
        """The product by itself."""
        return gate(self, None, False)


def squeeze(y: Placed, backend: str) -> tuple[Placed, Tensor, Link | None]:
    """`y` for :func:`gate` alone, its means ``[N, C, 1, 1]``, and the link between both."""
    if torch.is_grad_enabled() and y.value.requires_grad:
        value, mean, *link = _Squeeze.apply(y.value, backend, y.source is not None)
        return Placed(value, y.channels_last, source=y.source), mean, Link(*link)
    return y, y.value.mean((2, 3), keepdim=True), None


def gate(gated: Gated, residual: Placed | None, relu: bool, other_first: bool = False) -> Placed:
    """``relu(y * factor + residual)``. `other_first`: stock adds y to the residual, whose layout the sum has then."""
    y, link, factor, backend, owned = gated
    other = None if residual is None else worked_on(residual.value, residual.channels_last)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y.value, factor, other))
    if wanted:
        masked, of_factor, zeros = link or (None, None, None)
        again = None if zeros is None else (y.source, zeros)
        out = _Gate.apply(y.value, masked, of_factor, factor, other, relu, backend, again)
    elif owned and y.value.is_cpu and backend != "triton" and not torch.compiler.is_compiling():
        out = y.value  # fresh memory costs a CPU more than the pass does
        run("gate_add_relu_", out, factor, None, other, relu, backend=backend)
        bounds.remember(out, math.inf)  # what was known of it is of y
    else:
        out = run("gate_add_relu", y.value, factor, None, other, relu, backend=backend)
    return Placed(out, (residual if other_first else y).channels_last, relu)
