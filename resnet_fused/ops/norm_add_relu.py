"""Normalise, add the residual, clamp: the whole pointwise tail of a residual block in one pass.

Formula::

    r   = residual                                         (absent: 0)
        | residual_scale[c] * residual + residual_shift[c]  (a projection shortcut, still raw)
    y   = sample_factor[n] * (scale[c] * z + shift[c]) + r  (sample_factor absent: 1)
    out = y < 0 ? 0 : y  if relu else y                     (NaN and -0.0 pass, as in stock)

`z`, `residual`: ``[N, C, H, W]``, one dtype of float32, bfloat16, float16 (float64 on the CPU), channels_last.
`scale`, `shift`, `residual_scale`, `residual_shift`: ``[C]`` float32 (float64 for float64); `sample_factor`: ``[N]``,
same dtype (Stochastic Depth, Huang et al. 2016: 0 or 1/survival). All arithmetic in that dtype, with one rounding.
`out`: like z. `mask`: with ``emit_mask`` uint8 ``[N*H*W, ceil(C/8)]``, bit ``c % 8`` of byte ``c // 8`` is set where
``not (out <= 0)``, unused bits 0; otherwise an empty uint8 tensor.
"""

from __future__ import annotations

import torch

from .contract import (
    Tensor,
    channels_last,
    channels_last_like,
    define,
    mask_shape,
    nbytes,
    pack_mask,
    per_channel,
    per_sample,
)

SCHEMA = (
    "(Tensor z, Tensor scale, Tensor shift, Tensor? residual=None, Tensor? residual_scale=None, "
    "Tensor? residual_shift=None, Tensor? sample_factor=None, bool relu=True, bool emit_mask=False) "
    "-> (Tensor out, Tensor mask)"
)
FORMS = "z,residual:~C scale,shift,residual_scale,residual_shift:C sample_factor:N"


def reference(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    relu: bool = True,
    emit_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    y = z.to(scale.dtype) * per_channel(scale) + per_channel(shift)
    if sample_factor is not None:
        y = y * per_sample(sample_factor)
    if residual is not None:
        r = residual.to(scale.dtype)
        if residual_scale is not None:
            r = r * per_channel(residual_scale) + per_channel(residual_shift)
        y = y + r
    if relu:
        y = torch.relu(y)
    out = channels_last(y.to(z.dtype))
    mask = pack_mask(~(out <= 0)) if emit_mask else z.new_empty(0, dtype=torch.uint8)
    return out, mask


def fake(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    relu: bool = True,
    emit_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    return channels_last_like(z), z.new_empty(mask_shape(z) if emit_mask else (0,), dtype=torch.uint8)


def bytes(
    z,
    scale,
    shift,
    residual=None,
    residual_scale=None,
    residual_shift=None,
    sample_factor=None,
    relu=True,
    emit_mask=False,
):
    """One read of `z` and `residual`, one write of `out` and `mask`."""
    mask = mask_shape(z)[0] * mask_shape(z)[1] if emit_mask else 0
    return 2 * nbytes(z) + nbytes(residual) + mask


def flops(
    z,
    scale,
    shift,
    residual=None,
    residual_scale=None,
    residual_shift=None,
    sample_factor=None,
    relu=True,
    emit_mask=False,
):
    """A multiply-add, and one operation for each further term."""
    per_element = 2 + (residual is not None) + 2 * (residual_scale is not None)
    return z.numel() * (per_element + (sample_factor is not None) + bool(relu))


OP = define(
    "norm_add_relu",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
)
