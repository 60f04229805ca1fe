"""The memory layout that a value has where it leaves fused modules: stock's.

Everything fused is computed in channels_last. Stock's convolutions return channels_last where their input or their
weight is, else contiguous; its batch norm, ReLU, pools and additions keep the layout of the main branch. So the end of
a chain is channels_last in stock if its input or one of the main branch's weights is. Where it is not, somebody may
call ``.view`` on it, and one copy makes it what they expect.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .program import Addition, Normalisation, Program
from .saved import Source, counter_of

#: Mean and second moment of a tensor over all but its channels, ``[C]`` each, as `bn_stats` gives them.
Moments = tuple[Tensor, Tensor]


def suggests_channels_last(t: Tensor) -> bool:
    """Whether PyTorch takes `t` for channels_last: by its strides, in doubt not (``[N, C, 1, 1]`` as contiguous)."""
    if t.dim() != 4 or t.stride(1) == 0:
        return False
    sizes, strides, least = t.shape, t.stride(), 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * (sizes[d] if sizes[d] > 1 else 1)
    return True


class Placed(NamedTuple):
    """A value within fused modules, in whatever layout suits them, and whether stock's would be channels_last."""

    value: Tensor
    channels_last: bool
    clamped: bool = False  # by a ReLU: what stock saves for backward, and nobody may write to
    #: Of `value`, if known; from one program straight to the next, as others may write to it.
    moments: Moments | None = None
    owned: bool = False  # nobody else has it: evaluation may write over it
    #: Memory of the shape of the program's output, in channels_last, where evaluation may write that. Who hands it over
    #: looks whether it did.
    into: Tensor | None = None
    source: Source | None = None  # of `value`, which then who alone reads it need not keep for backward


def arrived(x: Tensor) -> Placed:
    """A value that somebody else made."""
    return Placed(x, suggests_channels_last(x))


def left(value: object) -> object:
    """A value in stock's layout: a :class:`Placed` one by a copy where it must be; everything else as it is."""
    if not isinstance(value, Placed):
        return value
    out = value.value
    if value.channels_last:
        return out
    watched = value.clamped and out.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    out = _Copied.apply(out) if watched and not out.is_contiguous() else out.contiguous()
    # one pixel or one channel is contiguous in both layouts; whoever reads it goes by the strides
    return out.view(-1).view(out.shape) if suggests_channels_last(out) else out


def behind(value: Tensor, before: Placed, weights: Iterable[Tensor], program: Program) -> Placed:
    """The end of `program`, with `weights` on its main branch, from the value `before` it."""
    in_channels_last = before.channels_last or any(map(suggests_channels_last, weights))
    return Placed(value, lies(value, in_channels_last, is_pointwise(program)), program.clamped)


def is_pointwise(program: Program) -> bool:
    """Whether a norm or an addition makes the output."""
    return isinstance(program.nodes[-1], Normalisation | Addition)


def lies(value: Tensor, in_channels_last: bool, pointwise: bool) -> bool:
    """Whether stock's `value` is channels_last, where its convolutions or its input are.

    Of one pixel or one channel, which is contiguous in both layouts, stock's convolutions and pools keep the layout,
    its `pointwise` operations do not: norms, additions, activations.
    """
    return in_channels_last and not (pointwise and value.is_contiguous())


class _Copied(torch.autograd.Function):
    """A contiguous copy; backward raises where somebody wrote to it, as a ReLU's does that saved its result."""

    @staticmethod
    def forward(ctx, out: Tensor) -> Tensor:
        copy = out.contiguous()
        ctx.save_for_backward(counter_of(copy))
        return copy

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        _ = ctx.saved_tensors  # compares versions
        return grad


class _Converted(torch.autograd.Function):
    """A contiguous value in channels_last; its gradient, which leaves fused modules as well, is contiguous again."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()


def worked_on(x: Tensor, in_channels_last: bool) -> Tensor:
    """`x` in channels_last; its gradient has the layout that stock's has, where `in_channels_last` tells which."""
    if in_channels_last or not x.requires_grad or x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return _Converted.apply(x)


def restrided(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of a weight with the strides of `like`: autograd then keeps it, and DDP's buckets take it.

    A 1x1 weight in channels_last has other strides than a matrix, for the same elements in the same order.
    """
    if grad.dim() != 4 or grad.stride() == like.stride():
        return grad
    if tuple(grad.shape[2:]) == (1, 1) and grad.is_contiguous() and like.is_contiguous():
        return grad.as_strided(like.shape, like.stride())
    return torch.empty_like(like, dtype=grad.dtype).copy_(grad)


class _Restrided(torch.autograd.Function):
    """A weight as it is; its gradient gets its strides."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)  # as the convolution does
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled() or is_transformed(grad):
            return grad
        return restrided(grad, ctx.saved_tensors[0])


def is_transformed(grad: Tensor) -> bool:
    """Whether a gradient is batched or under another function transform: for PyTorch's own operations only."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.peek_interpreter_stack() is not None


def with_grad_strides(weight: Tensor, in_channels_last: bool) -> Tensor:
    """`weight` for a stock convolution; `in_channels_last`: whether that runs in channels_last, and its gradient is."""
    if not weight.requires_grad or not torch.is_grad_enabled() or not in_channels_last:
        return weight
    return weight if suggests_channels_last(weight) else _Restrided.apply(weight)
