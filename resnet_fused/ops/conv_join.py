"""Convolution by any filter and all that follows it where its batch norm is known before, with the bits of its ReLU.

Formula (f = sample_factor[n], absent: 1; residual absent: 0)::

    y   = f * (scale[k]*conv2d(x, weight, stride, padding, dilation) + shift[k]) + residual
    out = y < 0 ? 0 : y  if relu else y                      (NaN and -0.0 pass, as in stock)

It is :mod:`.conv1x1_join` for other filters than 1x1, of a plain `x`: in training with frozen batch norm, whose scale
and shift follow from the running statistics, nothing lies between the convolution and what the block hands on. All of
it meets the float32 accumulators, with one rounding.

`x`: ``[N, C, H, W]`` float32, bfloat16, float16 (float64 by the reference), channels_last; `weight`: ``[K, C, R, S]``
of the same dtype, contiguous or channels_last, without groups; `residual`, `out`: ``[N, K, H', W']``; `scale`, `shift`:
``[K]`` and `sample_factor`: ``[N]``, float32 (float64 for float64). `mask`: with ``emit_mask`` the packed sign bits of
`out`, as in :mod:`.norm_add_relu`; otherwise an empty uint8 tensor.
"""

from __future__ import annotations

import torch

from . import conv_norm_add_relu
from .contract import (
    Tensor,
    channels_last,
    define,
    mask_shape,
    pack_mask,
    per_channel,
    per_sample,
    stat_dtype,
    takes_arguments_of,
)
from .conv_add_relu import output_shape

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual=None, int[2] stride=1, int[2] padding=0, "
    "int[2] dilation=1, Tensor? sample_factor=None, bool relu=True, bool emit_mask=False) -> (Tensor out, Tensor mask)"
)


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    sample_factor: Tensor | None = None,
    relu: bool = True,
    emit_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.device.type == "cpu" else stat_dtype(x.dtype)
    z = torch.conv2d(x.to(wide), weight.to(wide), None, stride, padding, dilation).to(stat_dtype(x.dtype))
    y = z * per_channel(scale) + per_channel(shift)
    y = y if sample_factor is None else y * per_sample(sample_factor)
    y = y if residual is None else y + residual
    out = channels_last((torch.relu(y) if relu else y).to(x.dtype))
    return out, pack_mask(~(out <= 0)) if emit_mask else x.new_empty(0, dtype=torch.uint8)


def _without_factor(a) -> tuple:
    """Arguments by which :mod:`.conv_norm_add_relu` makes as large a result, and moves as much but for the mask."""
    return (a.x, a.weight, *(None,) * 5, 0.0, a.residual, a.stride, a.padding, a.dilation)


@takes_arguments_of(reference)
def fake(a) -> tuple[Tensor, Tensor]:
    out = conv_norm_add_relu.fake(*_without_factor(a))
    return out, a.x.new_empty(mask_shape(out) if a.emit_mask else (0,), dtype=torch.uint8)


@takes_arguments_of(reference)
def bytes(a) -> int:
    """One read of `x`, or of its pixels that a 1x1 meets, of `weight` and `residual`; one write of `out` and `mask`."""
    n, k, h, w = output_shape(a.x.shape, a.weight.shape, a.stride, a.padding, a.dilation)
    mask = n * h * w * ((k + 7) // 8) if a.emit_mask else 0
    return conv_norm_add_relu.bytes(*_without_factor(a)) + mask


@takes_arguments_of(reference)
def flops(a) -> int:
    """Two per multiply-add of the convolution; what follows is not counted."""
    return conv_norm_add_relu.flops(*_without_factor(a))


OP = define(
    "conv_join",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    on_cpu=False,
    ulps=4,
)
