"""Batch statistics of a 1x1 convolution's output, from the Gram matrix of its input.

Formula (M = pixels of a; `gram`, `total`, `centre`: what :mod:`.gram` returned and was given for a)::

    m    = total/M;   cov = gram/M - m m'
    mean = W (m + centre)
    m2_k = M * max(0, w_k' cov w_k)     as x < 0 ? 0 : x, so that NaN passes
    M = 0: zeros

which is what `bn_stats` says of z = W a, without z. With `eps` the results of `bn_affine` instead of m2, as there.

`weight`: ``[K, C, 1, 1]`` float32, bfloat16, float16 (float64 on the CPU); `gram`: ``[C, C]``, symmetric,
`total`, `centre`: ``[C]``, results: ``[K]``, float32 (float64 for float64); `gamma`, `beta`: ``[K]``, any floating
dtype. `a`: ``[N, C', H, W]``; only N, H and
W are read (a number of pixels as an argument of the op would be a symbolic integer, which Dynamo cannot pass). Digits
cancel in `cov` where total/M is large against the deviation: hence the centre.
"""

from __future__ import annotations

import torch

from . import bn_affine
from .contract import Tensor, define, nbytes

SCHEMA = (
    f"(Tensor weight, Tensor gram, Tensor total, Tensor centre, Tensor a, {bn_affine.PARAMETERS}) "
    f"-> ({bn_affine.RESULTS})"
)
FORMS = "weight:KxC gram:C*C total,centre:C a:~A gamma,beta:K"


def reference(
    weight: Tensor,
    gram: Tensor,
    total: Tensor,
    centre: Tensor,
    a: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    return bn_affine.after(*_moments(weight, gram, total, centre, a), gamma, beta, a, eps)


def _moments(weight: Tensor, gram: Tensor, total: Tensor, centre: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
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


def fake(
    weight: Tensor,
    gram: Tensor,
    total: Tensor,
    centre: Tensor,
    a: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    return bn_affine.fake_after(centre.new_empty(weight.shape[0]), eps)


def bytes(weight, gram, total, centre, a, gamma=None, beta=None, eps=None):
    """One read of the matrices and vectors, one write of two vectors, or of six."""
    written = 2 if eps is None else 6
    return nbytes(weight, gram, total, centre, gamma, beta) + written * weight.shape[0] * centre.element_size()


def flops(weight, gram, total, centre, a, gamma=None, beta=None, eps=None):
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
    full_flops=flops,
)
