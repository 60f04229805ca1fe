"""First half of the backward of `norm_act`: the sums that batch norm needs.

Formula (the derivatives: `ops.activation`)::

    g         = grad_out * act'(scale[c] * z + shift[c])
    sum_g[c]  = sum_m g
    sum_gz[c] = sum_m g * (z - mean[c])

`grad_out`, `z`: ``[N, C, H, W]``, one dtype, channels_last; vectors ``[C]`` float32 (float64 for float64). `mean`: what
the norm subtracts; a sum of g*z would lose its digits where the mean is large beside the deviation. `g` is not written:
`norm_act_apply` makes it again, which takes less time than a write and a read.
"""

from __future__ import annotations

import torch

from . import activation
from .contract import Tensor, define, nbytes, per_channel, stat_dtype, two_launches

SCHEMA = (
    "(Tensor grad_out, Tensor z, Tensor mean, Tensor scale, Tensor shift, int act, float slope=0.) "
    "-> (Tensor sum_g, Tensor sum_gz)"
)
FORMS = "grad_out,z:~C mean,scale,shift:C"


def reference(
    grad_out: Tensor, z: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, act: int, slope: float = 0.0
) -> tuple[Tensor, Tensor]:
    dtype = stat_dtype(grad_out.dtype)
    wide = torch.float64 if z.device.type == "cpu" else dtype  # float64 sums where they are free
    y = z.to(dtype) * per_channel(scale) + per_channel(shift)
    g = activation.gradient(grad_out.to(dtype), y, act, slope).to(wide)
    return g.sum((0, 2, 3)).to(dtype), (g * (z - per_channel(mean))).sum((0, 2, 3)).to(dtype)


def fake(
    grad_out: Tensor, z: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, act: int, slope: float = 0.0
) -> tuple[Tensor, Tensor]:
    sums = [grad_out.new_empty(grad_out.shape[1], dtype=stat_dtype(grad_out.dtype)) for _ in range(2)]
    return sums[0], sums[1]


def bytes(grad_out, z, mean, scale, shift, act, slope=0.0):
    """One read of `grad_out` and `z`."""
    return nbytes(grad_out, z)


def flops(grad_out, z, mean, scale, shift, act, slope=0.0):
    """A multiply-add, the derivative and its product, a sum, and a subtraction with a multiply-add."""
    return z.numel() * (7 + activation.flops(act, derivative=True))


OP = define(
    "norm_act_backward",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=two_launches,
)
