"""The join of a residual block as one matrix product: 1x1 convolution, batch norm, residual or projection, ReLU.

Formula (x^ as in :mod:`.lazy`, f = sample_factor[n], absent: 1)::

    r   = residual                                          (absent: 0)
        | residual_scale[k]*residual + residual_shift[k]     (a raw convolution output)
        | scale2[k]*(x2[:, :, ::stride2, ::stride2] W2') + shift2[k]      (a projection, never written: ``[x^ | x2]``)
    y   = f * (scale[k]*(x^ W') + shift[k]) + r
    out = y < 0 ? 0 : y  if relu else y                      (NaN and -0.0 pass, as in stock)

Scale and shift are known before the product because the statistics of ``W x^`` follow from its Gram matrix
(``steps.folded_join``) or are the running ones. They meet the float32 accumulators, never the 16-bit weights, so
nothing is rounded that stock does not round; two branches have two accumulators.

`x`: ``[N, C, H, W]``, `x2`: ``[N, C2, H2, W2]`` with ``ceil(H2/stride2) = H``, `residual`, `out`: ``[N, K, H, W]``, one
dtype of float32, bfloat16, float16 (float64 by the reference), channels_last; `weight`, `weight2`: ``[K, C(2), 1, 1]``
of that dtype; vectors float32 (float64 for float64), ``[C]`` for x, ``[N]`` for sample_factor, else ``[K]``.
`mask`: with ``emit_mask`` the packed sign bits of `out`, as in :mod:`.norm_add_relu`; otherwise an empty uint8 tensor.
"""

from __future__ import annotations

import math

import torch

from . import lazy
from .contract import (
    Tensor,
    channels_last,
    channels_last_strides,
    define,
    nbytes,
    pack_mask,
    per_channel,
    per_sample,
    takes_arguments_of,
)

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? x_scale=None, Tensor? x_shift=None, "
    "Tensor? residual=None, Tensor? residual_scale=None, Tensor? residual_shift=None, Tensor? x2=None, "
    "Tensor? weight2=None, Tensor? scale2=None, Tensor? shift2=None, int[2] stride2=1, Tensor? sample_factor=None, "
    "bool relu=True, bool emit_mask=False) -> (Tensor out, Tensor mask)"
)
FORMS = (
    "x:~C weight:KxC scale,shift,residual_scale,residual_shift,scale2,shift2:K x_scale,x_shift:C "
    "residual:~K x2:~D<stride2 weight2:KxD sample_factor:N"
)


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    stride2=(1, 1),
    sample_factor: Tensor | None = None,
    relu: bool = True,
    emit_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    y = lazy.product(lazy.activation(x, x_scale, x_shift), weight) * per_channel(scale) + per_channel(shift)
    if sample_factor is not None:
        y = y * per_sample(sample_factor)
    if residual is not None:
        r = residual.to(scale.dtype)
        if residual_scale is not None:
            r = r * per_channel(residual_scale) + per_channel(residual_shift)
        y = y + r
    if x2 is not None:
        y = y + (lazy.product(lazy.pixels(x2, stride2), weight2) * per_channel(scale2) + per_channel(shift2))
    if relu:
        y = torch.relu(y)
    out = channels_last(y.to(x.dtype))
    return out, pack_mask(~(out <= 0)) if emit_mask else x.new_empty(0, dtype=torch.uint8)


def _output_shape(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], weight.shape[0], *x.shape[2:]


def _mask_shape(x: Tensor, weight: Tensor) -> tuple[int, int]:
    return x.shape[0] * x.shape[2] * x.shape[3], (weight.shape[0] + 7) // 8


@takes_arguments_of(reference)
def fake(t):
    shape = _output_shape(t.x, t.weight)
    out = t.x.new_empty_strided(shape, channels_last_strides(shape))
    return out, t.x.new_empty(_mask_shape(t.x, t.weight) if t.emit_mask else (0,), dtype=torch.uint8)


@takes_arguments_of(reference)
def bytes(t):
    """One read of `x`, the pixels of `x2`, the weights and `residual`; one write of `out` and `mask`."""
    out = math.prod(_output_shape(t.x, t.weight)) * t.x.element_size()
    second = None if t.x2 is None else lazy.pixels(t.x2, t.stride2)
    mask = math.prod(_mask_shape(t.x, t.weight)) if t.emit_mask else 0
    return nbytes(t.x, t.weight, t.residual, t.weight2, second) + out + mask


@takes_arguments_of(reference)
def flops(t):
    """Two per multiply-add of both products; prologue and epilogue are not counted."""
    depth = t.x.shape[1] + (0 if t.x2 is None else t.x2.shape[1])
    return 2 * math.prod(_output_shape(t.x, t.weight)) * depth


OP = define(
    "conv1x1_join",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    ulps=4,
)
