"""Materialise a lazy batch-norm gradient, for a consumer that cannot apply it on load.

Formula (f = sample_factor[n], absent: 1)::

    keep = not (scale*z + shift <= 0)  if scale and shift are given, else 1
    dz   = a[c] * f * (keep ? g : 0) + b[c] * z + d[c] + residual     (b and d absent, as for frozen batch norm: 0)

`g`, `z`, `residual`: ``[N, C, H, W]``, one dtype, channels_last; z may be None if neither b nor scale needs it. `a`,
`b`, `d`, `scale`, `shift`: ``[C]`` float32 (float64 for float64). `dz`: like g; its terms are added in the dtype of `a`
and rounded once.
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
    nbytes,
    per_channel,
    per_sample,
)

SCHEMA = (
    "(Tensor g, Tensor? z, Tensor a, Tensor? b=None, Tensor? d=None, Tensor? scale=None, Tensor? shift=None, "
    "Tensor? sample_factor=None, Tensor? residual=None) -> Tensor dz"
)
FORMS = "g,z,residual:~C a,b,d,scale,shift:C sample_factor:N"


def reference(
    g: Tensor,
    z: Tensor | None,
    a: Tensor,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    dz = g.to(a.dtype)
    if scale is not None:
        keep = ~(z.to(a.dtype) * per_channel(scale) + per_channel(shift) <= 0)
        dz = torch.where(keep, dz, torch.zeros_like(dz))
    if sample_factor is not None:
        dz = dz * per_sample(sample_factor)
    dz = dz * per_channel(a)
    if b is not None:
        dz = dz + per_channel(b) * z.to(a.dtype) + per_channel(d)
    if residual is not None:
        dz = dz + residual.to(a.dtype)
    return channels_last(dz.to(g.dtype))


def fake(
    g: Tensor,
    z: Tensor | None,
    a: Tensor,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    return channels_last_like(g)


def bytes(g, z, a, b=None, d=None, scale=None, shift=None, sample_factor=None, residual=None):
    """One read of `g`, of `residual` if given and, where it is needed, of `z`; one write of `dz`."""
    return 2 * nbytes(g) + nbytes(residual) + (nbytes(z) if b is not None or scale is not None else 0)


def flops(g, z, a, b=None, d=None, scale=None, shift=None, sample_factor=None, residual=None):
    """Multiply-adds of the affine map and of the recomputed sign, and the sum with `residual`."""
    given = [vector is not None for vector in (b, scale, sample_factor, residual)]
    return g.numel() * (1 + 3 * given[0] + 2 * given[1] + given[2] + given[3])


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
