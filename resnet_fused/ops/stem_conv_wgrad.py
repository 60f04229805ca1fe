"""Weight gradient of a dense convolution of few input channels: see `stem_conv`.

Formula, with ``z = conv2d(x, weight, stride, padding)`` and grad the gradient at z::

    grad_w[k, c, r, s] = sum_{n,p,q} grad[n, k, p, q] * x[n, c, p*stride - padding + r, q*stride - padding + s]

`grad`: ``[N, K, P, Q]``, `x`: ``[N, C, H, W]``, channels_last; `weight`: ``[K, C, R, S]``, dense, read for shape and
strides alone; float32. `grad_w`: like weight. Where a sum is not finite, all are ATen's.
"""

from __future__ import annotations

from . import conv_weight_grad
from .contract import Tensor, define, two_launches

SCHEMA = "(Tensor grad, Tensor x, Tensor weight, int[2] stride=1, int[2] padding=0) -> Tensor grad_w"


def reference(grad: Tensor, x: Tensor, weight: Tensor, stride=(1, 1), padding=(0, 0)) -> Tensor:
    return conv_weight_grad.reference(grad, x, weight, stride, padding)


def fake(grad: Tensor, x: Tensor, weight: Tensor, stride=(1, 1), padding=(0, 0)) -> Tensor:
    return conv_weight_grad.fake(grad, x, weight)


def bytes(grad, x, weight, stride=(1, 1), padding=(0, 0)):
    """One read of `grad` and `x`, one write of `grad_w`."""
    return conv_weight_grad.bytes(grad, x, weight)


def flops(grad, x, weight, stride=(1, 1), padding=(0, 0)):
    """Two per multiply-add."""
    return conv_weight_grad.flops(grad, x, weight)


OP = define(
    "stem_conv_wgrad",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    launches=two_launches,
    ulps=4,
)
