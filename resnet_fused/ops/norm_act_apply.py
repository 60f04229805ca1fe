"""Second half of the backward of `norm_act`: the gradient of what batch norm read.

Formula (the derivatives: `ops.activation`)::

    dz = a[c] * g * act'(scale[c] * z + shift[c]) + b[c] * z + d[c]     (b and d absent, as for frozen batch norm: 0)

`g`, `z`: ``[N, C, H, W]``, one dtype, channels_last; vectors ``[C]`` float32 (float64 for float64). `dz`: like g; its
terms are added in the dtype of `a` and rounded once. `norm_act_apply_` writes it into `g`, for a caller whose own that
is. The coefficients are those of batch norm's backward (Ioffe and Szegedy 2015), see ``steps.batch_norm``.
"""

from __future__ import annotations

from . import activation
from .contract import Tensor, channels_last, channels_last_like, define, define_in_place, nbytes, per_channel

SCHEMA = (
    "(Tensor g, Tensor z, Tensor a, Tensor? b, Tensor? d, Tensor scale, Tensor shift, int act, float slope=0.) "
    "-> Tensor dz"
)
FORMS = "g,z:~C a,b,d,scale,shift:C"


def reference(
    g: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: int,
    slope: float = 0.0,
) -> Tensor:
    wide = z.to(a.dtype)
    y = wide * per_channel(scale) + per_channel(shift)
    dz = activation.gradient(g.to(a.dtype), y, act, slope) * per_channel(a)
    if b is not None:
        dz = dz + per_channel(b) * wide + per_channel(d)
    return channels_last(dz.to(g.dtype))


def fake(g: Tensor, *args, **kwargs) -> Tensor:
    return channels_last_like(g)


def bytes(g, z, a, b, d, scale, shift, act, slope=0.0):
    """One read of `g` and `z`, one write of `dz`."""
    return 2 * nbytes(g) + nbytes(z)


def flops(g, z, a, b, d, scale, shift, act, slope=0.0):
    """A multiply-add, the derivative and two products, and the affine map."""
    return g.numel() * (4 + activation.flops(act, derivative=True) + 3 * (b is not None))


OP = define(
    "norm_act_apply",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
)

INPLACE_OP = define_in_place(OP)
