"""Batch statistics of a 1x1 convolution's output, from the Gram matrix of its input.

Formula (M = pixels of a; `gram`, `total`, `centre`: what :mod:`.gram` returned and was given for a)::

    m    = total/M;   cov = gram/M - m m'
    mean = W (m + centre)
    m2_k = M * max(0, w_k' cov w_k)     as x < 0 ? 0 : x, so that NaN passes
    M = 0: zeros

which is what `bn_stats` says of z = W a, without z.

`weight`: ``[K, C, 1, 1]`` float32, bfloat16, float16 (float64 on the CPU); `gram`: ``[C, C]``, symmetric,
`total`, `centre`: ``[C]``, `mean`, `m2`: ``[K]``, float32 (float64 for float64). `a`: ``[N, C', H, W]``; only N, H and
W are read (a number of pixels as an argument of the op would be a symbolic integer, which Dynamo cannot pass). Digits
cancel in `cov` where total/M is large against the deviation: hence the centre.
"""

from __future__ import annotations

import torch

from .contract import Tensor, define, nbytes

SCHEMA = "(Tensor weight, Tensor gram, Tensor total, Tensor centre, Tensor a) -> (Tensor mean, Tensor m2)"
FORMS = "weight:KxC gram:C*C total,centre:C a:~A"


def reference(weight: Tensor, gram: Tensor, total: Tensor, centre: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    k, count, dtype = weight.shape[0], a.shape[0] * a.shape[2] * a.shape[3], centre.dtype
    if count == 0:
        return centre.new_zeros(k), centre.new_zeros(k)
    wide = torch.float64 if weight.device.type == "cpu" else dtype
    w = weight.flatten(1).to(dtype)
    m = total.to(wide) / count
    cov = torch.addr(gram.to(wide) / count, m, m, alpha=-1).to(dtype)
    # The products are rounded once each; only their sums, where digits cancel, are worth float64.
    m2 = (((w @ cov) * w).sum(1, dtype=wide).clamp_min(0) * count).to(dtype)
    return (w * (m + centre).to(dtype)).sum(1, dtype=wide).to(dtype), m2


def fake(weight: Tensor, gram: Tensor, total: Tensor, centre: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    k = weight.shape[0]
    return centre.new_empty(k), centre.new_empty(k)


def bytes(weight, gram, total, centre, a):
    """One read of the matrices and vectors, one write of `mean` and `m2`."""
    return nbytes(weight, gram, total, centre) + 2 * weight.shape[0] * centre.element_size()


def flops(weight, gram, total, centre, a):
    """Two per multiply-add of ``W cov``, of its product with W, and of ``W (m + centre)``."""
    k, c = weight.shape[:2]
    return 2 * k * c * (c + 2)


OP = define(
    "gram_norm",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    small=True,
    compiled=True,
    forms=FORMS,
    full_precision=True,
)
