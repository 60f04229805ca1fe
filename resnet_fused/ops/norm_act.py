"""Batch norm and an activation other than ReLU in one pass.

Formula (the activations: `ops.activation`)::

    out = act(scale[c] * z + shift[c])

`z`: ``[N, C, H, W]`` of float32, bfloat16, float16 (float64 on the CPU), channels_last. `scale`, `shift`: ``[C]``
float32 (float64 for float64). All arithmetic in that dtype, with one rounding. `act`: the activation's code; `slope`:
of the leaky ReLU. `out`: like z. Nothing else is saved for backward: that makes ``scale*z + shift`` again.
"""

from __future__ import annotations

from . import activation
from .contract import Tensor, channels_last, channels_last_like, define, nbytes, per_channel

SCHEMA = "(Tensor z, Tensor scale, Tensor shift, int act, float slope=0.) -> Tensor out"
FORMS = "z:~C scale,shift:C"


def reference(z: Tensor, scale: Tensor, shift: Tensor, act: int, slope: float = 0.0) -> Tensor:
    y = z.to(scale.dtype) * per_channel(scale) + per_channel(shift)
    return channels_last(activation.value(y, act, slope).to(z.dtype))


def fake(z: Tensor, scale: Tensor, shift: Tensor, act: int, slope: float = 0.0) -> Tensor:
    return channels_last_like(z)


def bytes(z, scale, shift, act, slope=0.0):
    """One read of `z`, one write of `out`."""
    return 2 * nbytes(z)


def flops(z, scale, shift, act, slope=0.0):
    """A multiply-add, and the activation."""
    return z.numel() * (2 + activation.flops(act))


OP = define(
    "norm_act",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
)
