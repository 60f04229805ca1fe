"""Weight gradient of a 3x3 convolution of stride 1, by fewer multiplications than its formula has.

Formula, with ``z = conv2d(x, weight, padding=padding)`` and grad the gradient at z::

    grad_w[k, c, r, s] = sum_{n,p,q} grad[n, k, p, q] * x[n, c, p - padding + r, q - padding + s]

`grad`: ``[N, K, P, Q]``, `x`: ``[N, C, H, W]``, float32, channels_last; `weight`: ``[K, C, 3, 3]``, dense, read for
shape and strides alone. Winograd's F(3x3, 2x2): for every tile of 2x2 pixels of grad and the 4x4 of x around it 16
products instead of 36. Where a result is not finite, all are those of the direct sum: NaN and Inf reach what they reach
there. `grad_w`: like weight.
"""

from __future__ import annotations

import torch

from . import conv_weight_grad
from .contract import Tensor, define, nbytes, two_launches

SCHEMA = "(Tensor grad, Tensor x, Tensor weight, int[2] padding=1) -> Tensor grad_w"


def reference(grad: Tensor, x: Tensor, weight: Tensor, padding=(1, 1)) -> Tensor:
    return conv_weight_grad.reference(grad, x, weight, (1, 1), padding)


def fake(grad: Tensor, x: Tensor, weight: Tensor, padding=(1, 1)) -> Tensor:
    return torch.empty_like(weight)


def bytes(grad, x, weight, padding=(1, 1)):
    """One read of `grad` and `x`, one write of `grad_w`."""
    return nbytes(grad, x, weight)


def flops(grad, x, weight, padding=(1, 1)):
    """Two per multiply-add of the 16 at a tile; its transforms are small beside them."""
    n, k, p, q = grad.shape
    return 2 * 16 * n * -(-p // 2) * -(-q // 2) * k * x.shape[1]


OP = define(
    "winograd_conv3x3_wgrad",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    launches=two_launches,
    ulps=4,
)
