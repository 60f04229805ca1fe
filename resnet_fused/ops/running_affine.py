"""Batch norm with running statistics as a multiply-add: its per-channel arithmetic, the convolution's bias in it.

Formula (all per channel)::

    rstd  = 1/sqrt(var + eps)
    scale = gamma*rstd                       gamma absent: 1
    shift = beta + (bias - mean)*scale       beta, bias absent: 0

so that batch norm of ``conv(x) + bias`` is ``scale*conv(x) + shift``. It is made anew at every call, from what the
parameters hold then: a cache would not see a write through ``.data``, nor one between two replays of a CUDA graph.

`mean`, `var`: ``[C]``, the running statistics, one floating dtype; `gamma`, `beta`, `bias`: ``[C]``, any floating
dtype. Results: ``[C]``, float32 (float64 where `mean` is); `own_mean` is `mean` in a tensor of its own, which the
running statistics may move away from.
"""

from __future__ import annotations

import torch

from .contract import Tensor, define, nbytes, stat_dtype

SCHEMA = (
    "(Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, Tensor? bias, float eps) -> "
    "(Tensor own_mean, Tensor rstd, Tensor scale, Tensor shift)"
)
FORMS = "mean,var,gamma,beta,bias:C"

Vectors = tuple[Tensor, Tensor, Tensor, Tensor]


def reference(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, bias: Tensor | None, eps: float
) -> Vectors:
    stat = stat_dtype(mean.dtype)
    own, rstd = mean.to(stat, copy=True), (var.to(stat) + eps).rsqrt()
    scale = rstd.clone() if gamma is None else gamma.to(stat) * rstd
    offset = -own if bias is None else bias.to(stat) - own
    shift = offset * scale if beta is None else torch.addcmul(beta.to(stat), offset, scale)
    return own, rstd, scale, shift


def fake(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, bias: Tensor | None, eps: float
) -> Vectors:
    return tuple(mean.new_empty(mean.shape, dtype=stat_dtype(mean.dtype)) for _ in range(4))


def bytes(mean, var, gamma, beta, bias, eps):
    """One read of the vectors, one write of four."""
    return nbytes(mean, var, gamma, beta, bias) + 4 * mean.numel() * stat_dtype(mean.dtype).itemsize


def flops(mean, var, gamma, beta, bias, eps):
    """Seven a channel, a root and a division being one each."""
    return 7 * mean.numel()


OP = define(
    "running_affine",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    small=True,
    forms=FORMS,
)
