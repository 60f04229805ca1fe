"""Materialise a lazy batch-norm gradient, for a consumer that cannot apply it on load.

Formula (f = sample_factor[n], absent: 1; a absent: 1)::

    keep = bit of `mask`               if given, the packed bits of `norm_add_relu`
         | not (scale*z + shift <= 0)  if scale and shift are given
         | 1
    dz   = a[c] * f * (keep ? g : 0) + b[c] * z + d[c] + residual     (b and d absent, as for frozen batch norm: 0)

`g`, `z`, `residual`: ``[N, C, H, W]``, one dtype, channels_last; z may be None if neither b nor scale needs it. `a`,
`b`, `d`, `scale`, `shift`: ``[C]`` float32 (float64 for float64); `mask` excludes the last two. `dz`: like g; its terms
are added in the dtype of the vectors and rounded once.
`lazy_grad_apply_` writes dz into `g`, for a caller whose own it is; `residual` may then not share memory with `g`.
The coefficients are those of batch norm's backward (Ioffe and Szegedy 2015), see ``steps.batch_norm``. `residual` is
the gradient that reached the same tensor on another way, as on the identity path of a pre-activation block (He et al.
2016, https://arxiv.org/abs/1603.05027).
"""

from __future__ import annotations

import torch

from .contract import (
    Tensor,
    channels_last,
    channels_last_like,
    define,
    define_in_place,
    keep_from,
    nbytes,
    per_channel,
    per_sample,
    stat_dtype,
    takes_arguments_of,
)

SCHEMA = (
    "(Tensor g, Tensor? z, Tensor? a, Tensor? b=None, Tensor? d=None, Tensor? scale=None, Tensor? shift=None, "
    "Tensor? sample_factor=None, Tensor? residual=None, Tensor? mask=None) -> Tensor dz"
)
FORMS = "g,z,residual:~C a,b,d,scale,shift:C sample_factor:N mask:!C"


def reference(
    g: Tensor,
    z: Tensor | None,
    a: Tensor | None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    dtype = stat_dtype(g.dtype)
    dz, keep = g.to(dtype), None
    if mask is not None:
        keep = keep_from(mask, g)
    elif scale is not None:
        keep = ~(z.to(dtype) * per_channel(scale) + per_channel(shift) <= 0)
    if keep is not None:
        dz = torch.where(keep, dz, torch.zeros_like(dz))
    if sample_factor is not None:
        dz = dz * per_sample(sample_factor)
    if a is not None:
        dz = dz * per_channel(a)
    if b is not None:
        dz = dz + per_channel(b) * z.to(dtype) + per_channel(d)
    if residual is not None:
        dz = dz + residual.to(dtype)
    return channels_last(dz.to(g.dtype))


@takes_arguments_of(reference)
def fake(t) -> Tensor:
    return channels_last_like(t.g)


@takes_arguments_of(reference)
def bytes(t) -> int:
    """One read of `g`, of `residual` and `mask` if given and, where it is needed, of `z`; one write of `dz`."""
    read_z = t.b is not None or t.scale is not None
    return 2 * nbytes(t.g) + nbytes(t.residual, t.mask, t.z if read_z else None)


@takes_arguments_of(reference)
def flops(t) -> int:
    """Multiply-adds of the affine map and of the recomputed sign, and the sum with `residual`."""
    given = [vector is not None for vector in (t.a, t.b, t.scale, t.sample_factor, t.residual)]
    return t.g.numel() * (given[0] + 3 * given[1] + 2 * given[2] + given[3] + given[4])


OP = define(
    "lazy_grad_apply",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
)

INPLACE_OP = define_in_place(OP)
