"""Both gradients of a dense layer's 3x3 convolution, from what has gathered at its slice of the block's buffer.

Formula (as in :mod:`.lazy`)::

    dy          = grad + (b[g]*y + d[g])              the norms of all later layers, whose terms in y are in b and d
    z^          = relu(scale[k]*z + shift[k])
    keep        = not (scale[k]*z + shift[k] <= 0)
    g           = keep ? conv_transpose2d(dy, weight, padding=1) : 0      rounded to the dtype of z
    sum_g[k]    = sum_m g                             of g as rounded
    sum_gz[k]   = sum_m g * (z - mean[k])             the two sums that batch norm's backward needs
    grad_weight = that of conv2d(z^, weight, padding=1), whose gradient is dy

By Winograd's minimal filtering, as :mod:`.winograd_conv3x3` and :mod:`.winograd_conv3x3_wgrad`: where a gradient is
not finite, it is that of a direct sum.

`grad`, `y`: ``[N, G, H, W]``, where y is what the convolution made, channels_last or slices
(:func:`.contract.is_slice`); `z`: ``[N, K, H, W]``, channels_last; `weight`: ``[G, K, 3, 3]``, contiguous or
channels_last; one dtype: float32 (float64, bfloat16 and float16 by the reference). `b`, `d`: ``[G]``, `scale`, `shift`,
`mean`: ``[K]``, in the dtype of statistics. `g`: ``[N, K, H, W]``, channels_last; `sum_g`, `sum_gz`: ``[K]``, in the
dtype of statistics; `grad_weight`: like weight.
"""

from __future__ import annotations

import torch

from . import conv_weight_grad, lazy
from .contract import (
    Tensor,
    channels_last,
    channels_last_like,
    define,
    nbytes,
    per_channel,
    stat_dtype,
    takes_arguments_of,
)

SCHEMA = (
    "(Tensor grad, Tensor y, Tensor b, Tensor d, Tensor z, Tensor weight, Tensor scale, Tensor shift, Tensor mean) "
    "-> (Tensor g, Tensor sum_g, Tensor sum_gz, Tensor grad_weight)"
)
FORMS = "grad,y:~G b,d:G z:~K weight:GxKx3 scale,shift,mean:K"


def reference(
    grad: Tensor,
    y: Tensor,
    b: Tensor,
    d: Tensor,
    z: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = stat_dtype(z.dtype)
    dy = channels_last(lazy.gradient(grad, z=lazy.settled(y, b), b=b, d=d))
    g = torch.nn.functional.conv_transpose2d(dy, weight, padding=1).to(dtype)
    keep = ~(z.to(dtype) * per_channel(scale) + per_channel(shift) <= 0)
    g = channels_last(torch.where(keep, g, torch.zeros_like(g)).to(z.dtype))
    wide = g.double() if g.device.type == "cpu" else g.to(dtype)
    sums = wide.sum((0, 2, 3)).to(dtype), (wide * (z - per_channel(mean))).sum((0, 2, 3)).to(dtype)
    activation = channels_last(lazy.activation(z, scale, shift))
    return g, *sums, conv_weight_grad.reference(dy, activation, weight, (1, 1), (1, 1))


@takes_arguments_of(reference)
def fake(t):
    sum_g, sum_gz = (t.z.new_empty(t.z.shape[1], dtype=stat_dtype(t.z.dtype)) for _ in range(2))
    return channels_last_like(t.z), sum_g, sum_gz, torch.empty_like(t.weight)


@takes_arguments_of(reference)
def bytes(t):
    """For either gradient a read of `grad`, `y` and `z`; one of `weight`, one write of `g` and `grad_weight`."""
    return 2 * nbytes(t.grad, t.y, t.z) + nbytes(t.z, t.weight, t.weight)


@takes_arguments_of(reference)
def flops(t):
    """Those of the direct sums of both gradients, two per multiply-add."""
    return 2 * 2 * t.grad.numel() * 9 * t.z.shape[1]


def launches(results: list[Tensor]) -> int:
    """A product for either gradient, and what adds the partial sums of both."""
    return 3


OP = define(
    "dense_conv3x3_backward",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=launches,
    sums_of_rounded=True,
    ulps=4,
)
