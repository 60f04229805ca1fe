"""Convolution with the weight as its module keeps it, and all that follows it on the accumulator.

Formula, absent terms being 0::

    z   = conv2d(x, weight, bias, stride, padding, dilation)
    y   = (z - mean[k]) * gamma[k]/sqrt(var[k] + eps) + beta[k]  (mean absent: z)  + residual
    out = y < 0 ? 0 : y  if relu else y                          (NaN passes, as in stock)

`x`: ``[N, C, H, W]``, `residual` and `out`: ``[N, K, H', W']``, channels_last; `weight`: ``[K, C, R, S]``, contiguous
or channels_last, without groups; `bias`, `mean`, `var`, `gamma`, `beta`: ``[K]``, float32 where data are of 16 bits.
Everything is computed in that dtype, on GPUs but for the products of float32, which are of TF32 there; `mean` and
`var`, the running statistics, come together.

The weight is read once, as it lies in memory, and taps that meet no pixel are not (of a channels_last weight, on CPUs;
GPUs copy one of several taps that is not channels_last). Nothing is made of it that could be kept, so it is seen as it
is at every call.

`conv_norm_add_relu_` writes `out`, a tensor of the result's shape in channels_last that shares no memory with what is
read; with `adds`, `out` itself is the residual.
"""

from __future__ import annotations

import math

import torch

from .contract import Tensor, channels_last, define, nbytes, per_channel, takes_arguments_of
from .conv_add_relu import output_shape

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, "
    "Tensor? residual=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, bool relu=False) -> Tensor out"
)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    relu: bool = False,
) -> Tensor:
    y = torch.conv2d(x, weight, None, stride, padding, dilation)
    y = y if bias is None else y + per_channel(bias)
    if mean is not None:
        rstd = (var + eps).rsqrt()
        y = (y - per_channel(mean)) * per_channel(rstd if gamma is None else gamma * rstd)
        y = y if beta is None else y + per_channel(beta)
    y = y if residual is None else y + residual
    return channels_last((torch.relu(y) if relu else y).to(x.dtype))


@takes_arguments_of(reference)
def fake(a) -> Tensor:
    n, k, h, w = output_shape(a.x.shape, a.weight.shape, a.stride, a.padding, a.dilation)
    return a.x.new_empty_strided((n, k, h, w), (h * w * k, 1, w * k, k))


@takes_arguments_of(reference)
def bytes(a) -> int:
    """One read of `x`, or of those of its pixels that a 1x1 meets, of `weight` and `residual`, one write of `out`."""
    _, k, *_ = shape = output_shape(a.x.shape, a.weight.shape, a.stride, a.padding, a.dilation)
    out, read = math.prod(shape) * a.x.element_size(), nbytes(a.x)
    if tuple(a.weight.shape[2:]) == (1, 1):
        read = min(read, out // max(k, 1) * a.x.shape[1])
    return read + nbytes(a.weight, a.residual) + out


@takes_arguments_of(reference)
def flops(a) -> int:
    """Two per multiply-add of the convolution; what follows is not counted."""
    return 2 * math.prod(output_shape(a.x.shape, a.weight.shape, a.stride, a.padding, a.dilation)) * a.weight[0].numel()


OP = define(
    "conv_norm_add_relu",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    ulps=4,
)


INPLACE_SCHEMA = (
    "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, "
    "float eps, Tensor? residual=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, bool relu=False, "
    "bool adds=False) -> ()"
)


def inplace_reference(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    relu: bool = False,
    adds: bool = False,
) -> None:
    if adds and residual is not None:
        raise RuntimeError("conv_norm_add_relu_: got a residual where out itself is one; pass either")
    residual = out if adds else residual
    out.copy_(reference(x, weight, bias, mean, var, gamma, beta, eps, residual, stride, padding, dilation, relu))


def inplace_fake(out: Tensor, *args, **kwargs) -> None:
    return None


@takes_arguments_of(inplace_reference)
def inplace_bytes(a) -> int:
    """As `conv_norm_add_relu`; what `out` holds is read where it is added."""
    places = {"stride": a.stride, "padding": a.padding, "dilation": a.dilation}
    vectors = (a.bias, a.mean, a.var, a.gamma, a.beta, a.eps)
    return bytes(a.x, a.weight, *vectors, a.out if a.adds else a.residual, **places)


@takes_arguments_of(inplace_reference)
def inplace_flops(a) -> int:
    """As `conv_norm_add_relu`."""
    return 2 * a.out.numel() * a.weight[0].numel()


INPLACE_OP = define(
    "conv_norm_add_relu_",
    INPLACE_SCHEMA,
    reference=inplace_reference,
    fake=inplace_fake,
    bytes=inplace_bytes,
    flops=inplace_flops,
    compiled=True,
    ulps=4,
)
