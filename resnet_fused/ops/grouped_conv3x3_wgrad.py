"""Weight gradient of a grouped 3x3 convolution with padding 1.

Formula, with ``z = conv2d(x, weight, stride=stride, padding=1, groups=groups)``, grad the gradient at z, groups of
``width`` channels, as many outputs as inputs, and g the group of k::

    grad_w[k, c, r, s] = sum_{n,p,q} grad[n, k, p, q] * x[n, g * width + c, p * stride - 1 + r, q * stride - 1 + s]

`grad`: ``[N, C, P, Q]``, `x`: ``[N, C, H, W]``, float32, channels_last; `weight`: ``[C, width, 3, 3]``, dense, read for
shape and strides alone; `stride`: 1 or 2. `grad_w`: like weight.
"""

from __future__ import annotations

import torch

from .contract import Tensor, define, nbytes, two_launches

SCHEMA = "(Tensor grad, Tensor x, Tensor weight, int stride=1) -> Tensor grad_w"


def reference(grad: Tensor, x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    if grad.numel() == 0:
        return torch.zeros_like(weight)
    settings = ([stride] * 2, [1, 1], [1, 1], False, [0, 0], x.shape[1] // weight.shape[1], [False, True, False])
    if grad.dtype.itemsize == 2:  # of which oneDNN makes infinities where an image has one column
        grad, x = grad.float(), x.float()
    grad_w = torch.ops.aten.convolution_backward(grad, x, weight.to(x.dtype), None, *settings)[1]
    return torch.empty_like(weight).copy_(grad_w)


def fake(grad: Tensor, x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    return torch.empty_like(weight)


def bytes(grad, x, weight, stride=1):
    """One read of `grad` and `x`, one write of `grad_w`."""
    return nbytes(grad, x, weight)


def flops(grad, x, weight, stride=1):
    """Two per multiply-add, padding's included."""
    return 2 * grad[:, 0].numel() * weight.numel()


OP = define(
    "grouped_conv3x3_wgrad",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    launches=two_launches,
    ulps=4,
)
