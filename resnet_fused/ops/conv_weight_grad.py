"""Weight gradient of a dense convolution.

Formula, with ``z = conv2d(x, weight, stride, padding, dilation)`` and grad the gradient at z::

    grad_w[k, c, r, s] = sum_{n,p,q} grad[n, k, p, q] * x[n, c, p*stride - padding + r*dilation, q*... + s*dilation]

`grad`: ``[N, K, P, Q]``, `x`: ``[N, C, H, W]``, one dtype of float32, bfloat16, float16 (float64 on the CPU),
channels_last; `weight`: ``[K, C, R, S]``, dense, read for shape and strides alone. Sums in float32 (or float64).
`grad_w`: like weight.
"""

from __future__ import annotations

import torch

from .contract import Tensor, define, nbytes, two_launches

SCHEMA = "(Tensor grad, Tensor x, Tensor weight, int[2] stride=1, int[2] padding=0, int[2] dilation=1) -> Tensor grad_w"


def reference(grad: Tensor, x: Tensor, weight: Tensor, stride=(1, 1), padding=(0, 0), dilation=(1, 1)) -> Tensor:
    grad_w = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], 1, [False, True, False]
    )[1]
    return torch.empty_like(weight).copy_(grad_w)


def fake(grad: Tensor, x: Tensor, weight: Tensor, stride=(1, 1), padding=(0, 0), dilation=(1, 1)) -> Tensor:
    return torch.empty_like(weight)


def bytes(grad, x, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    """One read of `grad` and `x`, one write of `grad_w`."""
    return nbytes(grad, x, weight)


def flops(grad, x, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    """Two per multiply-add."""
    return 2 * grad.numel() * weight[0].numel()


OP = define(
    "conv_weight_grad",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    launches=two_launches,
    ulps=4,
)
