"""Convolution by any filter of a plain or lazy activation, with the batch statistics of its result.

Formula (x^ as in :mod:`.lazy`)::

    z    = conv2d(x^, weight, stride, padding, dilation)     rounded to the dtype of x
    mean, m2 = bn_stats(z)                                   with emit_stats, of z as rounded; else empty
    with eps, the results of `bn_affine` instead of m2, as in `bn_stats`

It is :mod:`.conv1x1` for other filters than 1x1. Padding is of x^: what lies outside the image is zero, not
``relu(x_shift)``.

`x`: ``[N, C, H, W]`` float32, bfloat16, float16 (float64 by the reference), channels_last; `weight`: ``[K, C, R, S]``
of the same dtype, contiguous or channels_last, without groups; `x_scale`, `x_shift`: ``[C]`` float32 (float64 for
float64), both or neither; `gamma`, `beta`: ``[K]``, any floating dtype. `z`: ``[N, K, H', W']``; all other results:
``[K]``, in the dtype of statistics, merged by Chan's rule.
"""

from __future__ import annotations

import math

import torch

from . import bn_affine, bn_stats, lazy
from .contract import (
    Tensor,
    channels_last,
    channels_last_strides,
    define,
    nbytes,
    one_more_for_sums,
    stat_dtype,
    takes_arguments_of,
)
from .conv_add_relu import output_shape

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? x_scale=None, Tensor? x_shift=None, int[2] stride=1, int[2] padding=0, "
    f"int[2] dilation=1, bool emit_stats=True, {bn_affine.PARAMETERS}) -> (Tensor z, {bn_affine.RESULTS})"
)


def reference(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    emit_stats: bool = True,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    wide = torch.float64 if x.device.type == "cpu" else stat_dtype(x.dtype)
    a = lazy.activation(x, x_scale, x_shift).to(wide)
    z = channels_last(torch.conv2d(a, weight.to(wide), None, stride, padding, dilation).to(x.dtype))
    return z, *bn_stats.emitted(z, emit_stats, gamma, beta, eps)


def _shape(a) -> tuple[int, int, int, int]:
    return output_shape(a.x.shape, a.weight.shape, a.stride, a.padding, a.dilation)


@takes_arguments_of(reference)
def fake(a):
    shape = _shape(a)
    z = a.x.new_empty_strided(shape, channels_last_strides(shape))
    return z, *bn_affine.fake_after(a.x.new_empty(shape[1] if a.emit_stats else 0, dtype=stat_dtype(a.x.dtype)), a.eps)


@takes_arguments_of(reference)
def bytes(a) -> int:
    """One read of `x`, or of those of its pixels that a 1x1 meets, and of `weight`, one write of `z`."""
    _, k, *_ = shape = _shape(a)
    out, read = math.prod(shape) * a.x.element_size(), nbytes(a.x)
    if tuple(a.weight.shape[2:]) == (1, 1):
        read = min(read, out // max(k, 1) * a.x.shape[1])
    return read + nbytes(a.weight) + out


@takes_arguments_of(reference)
def flops(a) -> int:
    """Two per multiply-add of the convolution; prologue and epilogue are not counted."""
    return 2 * math.prod(_shape(a)) * a.weight[0].numel()


OP = define(
    "conv_values",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    on_cpu=False,
    launches=one_more_for_sums,
    sums_of_rounded=True,
    ulps=4,
)
