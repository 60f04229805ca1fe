"""Convolution with an epilogue: shift, residual add and ReLU before the only write.

Formula::

    y   = conv2d(x, weight, stride, padding, dilation, groups) + shift[k] + residual     (absent terms: 0)
    out = y < 0 ? 0 : y  if relu else y

`x`: ``[N, C, H, W]``, `weight`: ``[K, C/groups, R, S]``, `residual` and `out`: ``[N, K, H', W']``, one dtype of
float32, bfloat16, float16 (float64 by the reference), channels_last; `shift`: ``[K]`` float32 (float64 for float64).
This is the join of a residual block (batch norm's scale folded into `weight`), folded inference, and, with a
transposed weight, the data gradient of a 1x1 convolution that adds the identity path's gradient.
"""

from __future__ import annotations

import math

import torch

from .contract import Tensor, channels_last, define, nbytes, per_channel

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? shift=None, Tensor? residual=None, int[2] stride=1, int[2] padding=0, "
    "int[2] dilation=1, int groups=1, bool relu=False) -> Tensor out"
)


def is_convolution(x, weight, stride, padding, dilation) -> bool:
    """Whether these can be the shapes of `x` and `weight` and what goes with them, whatever their sizes."""
    pairs = (stride, padding, dilation)
    if len(x) != 4 or len(weight) != 4 or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        return False
    return all(number > 0 for number in (*stride, *dilation))


def output_shape(x, weight, stride, padding, dilation) -> tuple[int, int, int, int]:
    """Shape of the convolution's result from the shapes of `x` and `weight`."""
    spatial = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    ]
    return x[0], weight[0], *spatial


def reference(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    if shift is not None:
        y = y + per_channel(shift)
    if residual is not None:
        y = y + residual
    y = torch.relu(y) if relu else y
    return channels_last(y.to(x.dtype))


def fake(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    n, k, h, w = output_shape(x.shape, weight.shape, stride, padding, dilation)
    return x.new_empty_strided((n, k, h, w), (h * w * k, 1, w * k, k))


def bytes(x, weight, shift=None, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False):
    """One read of `x`, `weight` and `residual`, one write of `out`."""
    out = math.prod(output_shape(x.shape, weight.shape, stride, padding, dilation)) * x.element_size()
    return nbytes(x, weight, residual) + out


def flops(x, weight, shift=None, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False):
    """Two per multiply-add of the convolution; the epilogue is not counted."""
    return 2 * math.prod(output_shape(x.shape, weight.shape, stride, padding, dilation)) * weight[0].numel()


OP = define(
    "conv_add_relu",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    ulps=4,
)


INPLACE_SCHEMA = (
    "(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? shift=None, int[2] stride=1, int[2] padding=0, "
    "int[2] dilation=1, int groups=1, bool relu=False) -> ()"
)


def inplace_reference(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups: int = 1,
    relu: bool = False,
) -> None:
    """``residual <- act(residual + conv2d(x, weight) + shift)``: the join into a buffer that is the caller's alone."""
    residual.add_(reference(x, weight, shift, None, stride, padding, dilation, groups))
    if relu:
        torch.relu_(residual)


def inplace_fake(residual, x, weight, shift=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False):
    return None


def inplace_bytes(
    residual, x, weight, shift=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False
):
    """As `conv_add_relu`."""
    return bytes(x, weight, shift, residual, stride, padding, dilation, groups, relu)


def inplace_flops(
    residual, x, weight, shift=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False
):
    """As `conv_add_relu`."""
    return flops(x, weight, shift, residual, stride, padding, dilation, groups, relu)


INPLACE_OP = define(
    "conv_add_relu_",
    INPLACE_SCHEMA,
    ulps=4,
    reference=inplace_reference,
    fake=inplace_fake,
    bytes=inplace_bytes,
    flops=inplace_flops,
)
