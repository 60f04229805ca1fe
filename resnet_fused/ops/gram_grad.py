"""Backward of the Gram join in its small matrices: the weight gradient, gamma's, and the correction of the input's.

Formula (M = pixels of a; `gram`, `total`, `centre`: of :mod:`.gram` for a; P = product = g' a and sum_g = sum g, of
:mod:`.conv1x1_wgrad` for the masked gradient g, not shifted by centre)::

    P_d = P - sum_g centre';   Wm = W (total/M)
    grad_gamma  = rstd * (rowsum(W * P_d) - Wm * sum_g)
    b  = -scale*rstd*grad_gamma/M;   d0 = scale*(rstd*grad_gamma*Wm - sum_g)/M
    grad_weight = scale*P_d + b*(W gram) + d0 total'
                                                      rounded to the dtype of weight, whose gradient it is
    coupling    = S = W' diag(b) W                    rounded to the dtype of weight, exactly symmetric
    constant    = d0 W - centre S = (d0 - b*(W centre)) W
    M = 0: zeros

so that the input's gradient is ``g (scale*W) + a coupling + constant`` (:mod:`.conv1x1_dgrad`).

`weight`: ``[K, C, 1, 1]`` float32, bfloat16, float16 (float64 on the CPU), `grad_weight`: ``[K, C]`` and `coupling`:
``[C, C, 1, 1]``, contiguous, of that dtype; all others float32 (float64 for float64): `product`: ``[K, C]``, `gram`:
``[C, C]``, `total`, `centre`, `constant`: ``[C]``, `sum_g`, `scale`, `rstd`, `grad_gamma`: ``[K]``. `a`:
``[N, C, H, W]``; only its shape is read. Digits cancel in P_d where the mean is large: kernels take it as one fused
multiply-add.
"""

from __future__ import annotations

import torch

from .contract import Tensor, define, nbytes

SCHEMA = (
    "(Tensor weight, Tensor product, Tensor gram, Tensor total, Tensor centre, Tensor sum_g, Tensor scale, "
    "Tensor rstd, Tensor a) -> (Tensor grad_weight, Tensor grad_gamma, Tensor coupling, Tensor constant)"
)
FORMS = "weight:KxC product:K*C gram:C*C total,centre:C sum_g,scale,rstd:K a:~A"


def reference(
    weight: Tensor,
    product: Tensor,
    gram: Tensor,
    total: Tensor,
    centre: Tensor,
    sum_g: Tensor,
    scale: Tensor,
    rstd: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (k, c), count, dtype = weight.shape[:2], a.shape[0] * a.shape[2] * a.shape[3], scale.dtype
    if count == 0:
        zeros = scale.new_zeros
        return weight.new_zeros(k, c), zeros(k), weight.new_zeros(c, c, 1, 1), zeros(c)
    wide = torch.float64 if weight.device.type == "cpu" else dtype
    w = weight.flatten(1).to(dtype)
    # As in gram_norm: float64 where digits cancel, not for the products.
    shifted = torch.addr(product.to(wide), sum_g.to(wide), centre.to(wide), alpha=-1).to(dtype)
    offset = (w * (total / count)).sum(1, dtype=wide)
    grad_gamma = rstd * torch.addcmul((w * shifted).sum(1, dtype=wide), offset, sum_g, value=-1).to(dtype)
    unit = scale / count
    b = -unit * rstd * grad_gamma
    d0 = unit * torch.addcmul(-sum_g, rstd * grad_gamma, offset.to(dtype))
    correction = torch.addr(b.unsqueeze(1) * (w @ gram), d0, total)
    grad_weight = torch.addcmul(correction, scale.unsqueeze(1), shifted)
    constant = (d0 - b * (w * centre).sum(1, dtype=wide).to(dtype)) @ w
    upper = (w.T @ (b.unsqueeze(1) * w)).to(weight.dtype).triu()
    return grad_weight.to(weight.dtype), grad_gamma, (upper + upper.triu(1).T).view(c, c, 1, 1), constant


#: Input channels up to which a second sum over W's rows costs less than a launch that waits for the first.
NARROW = 128


def fake(
    weight: Tensor,
    product: Tensor,
    gram: Tensor,
    total: Tensor,
    centre: Tensor,
    sum_g: Tensor,
    scale: Tensor,
    rstd: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, c = weight.shape[:2]
    return weight.new_empty(k, c), scale.new_empty(k), weight.new_empty(c, c, 1, 1), scale.new_empty(c)


def bytes(weight, product, gram, total, centre, sum_g, scale, rstd, a):
    """One read of the matrices and vectors, a second one of a wide weight, one write of the results.

    b is known from sums along all rows of ``W * P_d``, and ``W' diag(b) W`` needs b: two passes over the weight; a
    narrow one stays in a cache.
    """
    k, c = weight.shape[:2]
    written = (k + c) * scale.element_size() + (k * c + c * c) * weight.element_size()
    return nbytes(weight, weight if c > NARROW else None, product, gram, total, centre, sum_g, scale, rstd) + written


def flops(weight, product, gram, total, centre, sum_g, scale, rstd, a):
    """Two per multiply-add of ``W gram`` and of the upper half of ``W' diag(b) W``."""
    k, c = weight.shape[:2]
    return 2 * k * c * c + k * c * (c + 1)


def launches(results: list[Tensor]) -> int:
    """The rows of W, and the coupling once b is known for all of them."""
    return 1 if not results or results[0].shape[1] <= NARROW else 2


OP = define(
    "gram_grad",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    small=True,
    compiled=True,
    forms=FORMS,
    launches=launches,
    full_flops=flops,
)
