"""Both gradients of a dense layer's 1x1 convolution, added to what has gathered at its prefix of the block's buffer.

Formula (as in :mod:`.lazy`)::

    dz          = a[k]*g + (b[k]*z + d[k])
    x^          = relu(scale[c]*x + shift[c])
    keep        = not (scale[c]*x + shift[c] <= 0)
    h           = keep ? dz W : 0                     in the dtype of statistics
    out        <- (grad, or out where there is none) + scale[c]*h
    sum_g[c]    = sum_m h
    sum_gx[c]   = sum_m h * (x - mean[c])             the two sums that batch norm's backward needs
    grad_weight[k, c] = sum_m dz[m, k] * x^[m, c]

Of batch norm's gradient ``scale*h + B*x + D`` only the first term depends on the layer more than by two numbers a
channel: the others are left to who reads `out` last, for all layers at once.

`out`, `grad`, `x`: ``[N, C, H, W]``, channels_last or slices (:func:`.contract.is_slice`); `out` has no memory in
common with the others. `g`, `z`: ``[N, K, H, W]``, channels_last; `weight`: ``[K, C, 1, 1]``, dense; one dtype: float32
(float64, bfloat16 and float16 by the reference). `a`, `b`, `d`: ``[K]``, `scale`, `shift`, `mean`: ``[C]``, in the
dtype of statistics, as are `sum_g`, `sum_gx`: ``[C]``. `grad_weight`: like weight. Products are of dz and x^ as rounded
to the activations' dtype.
"""

from __future__ import annotations

import torch

from . import lazy
from .contract import (
    Tensor,
    channels_last,
    define,
    nbytes,
    per_channel,
    stat_dtype,
    takes_arguments_of,
    two_launches,
)

SCHEMA = (
    "(Tensor(a!) out, Tensor? grad, Tensor g, Tensor z, Tensor a, Tensor b, Tensor d, Tensor x, Tensor weight, "
    "Tensor scale, Tensor shift, Tensor mean) -> (Tensor sum_g, Tensor sum_gx, Tensor grad_weight)"
)
FORMS = "out,grad,x:~C g,z:~K a,b,d:K weight:KxC scale,shift,mean:C"


def reference(
    out: Tensor,
    grad: Tensor | None,
    g: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = stat_dtype(x.dtype)
    dz = channels_last(lazy.gradient(g, z=lazy.settled(z, b), a=a, b=b, d=d))
    keep = ~(x.to(dtype) * per_channel(scale) + per_channel(shift) <= 0)
    h = lazy.product(dz, weight.transpose(0, 1))
    h = torch.where(keep, h, torch.zeros_like(h))
    out.copy_((out if grad is None else grad).to(dtype) + per_channel(scale) * h)
    wide = h.double() if h.device.type == "cpu" else h
    sums = wide.sum((0, 2, 3)).to(dtype), (wide * (x - per_channel(mean))).sum((0, 2, 3)).to(dtype)
    product = lazy.matrix(dz).T @ lazy.matrix(lazy.activation(x, scale, shift))
    return *sums, torch.empty_like(weight).copy_(product.view(weight.shape))


@takes_arguments_of(reference)
def fake(t):
    sum_g, sum_gx = (t.x.new_empty(t.x.shape[1], dtype=stat_dtype(t.x.dtype)) for _ in range(2))
    return sum_g, sum_gx, torch.empty_like(t.weight)


@takes_arguments_of(reference)
def bytes(t):
    """One read of everything, one write of `out` and `grad_weight`."""
    return nbytes(t.out, t.out if t.grad is None else t.grad, t.g, t.z, t.x, t.weight, t.weight)


@takes_arguments_of(reference)
def flops(t):
    """Two per multiply-add of both gradients; what surrounds them is not counted."""
    return 2 * 2 * t.g.numel() * t.x.shape[1]


OP = define(
    "dense_conv1x1_backward",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=two_launches,
    sums_of_rounded=True,
    ulps=4,
)
