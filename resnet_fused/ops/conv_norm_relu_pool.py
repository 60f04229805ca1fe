"""The stem of a network in evaluation: convolution, batch norm with running statistics, ReLU and max pool in one pass.

Formula, absent terms being 0::

    y   = conv_norm_add_relu(x, weight, bias, mean, var, gamma, beta, eps, stride=stride, padding=padding, relu=True)
    out = max_pool2d(y, pool_kernel, pool_stride, pool_padding)           (dilation 1, floor mode; NaN passes)

`x`: ``[N, C, H, W]``, channels_last; `weight`: ``[K, C, R, S]``, of any strides, without groups; `bias`, `mean`, `var`,
`gamma`, `beta`: ``[K]``; float32. `mean` and `var`, the running statistics, come together. `out`: channels_last. Any
number of input channels is taken, but the loops are made for up to 4, see `stem_conv`.

Nothing is made of the weight that could be kept, so it is seen as it is at every call; of what lies between
convolution and pool, a few rows are in the cache and nothing is written.
"""

from __future__ import annotations

import math

import torch

from . import conv_norm_add_relu
from .contract import Tensor, channels_last, channels_last_strides, define, nbytes, takes_arguments_of
from .conv_add_relu import output_shape
from .norm_relu_pool import pooled_shape

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, "
    "int[2] stride=1, int[2] padding=0, int[2] pool_kernel=3, int[2] pool_stride=2, int[2] pool_padding=1) "
    "-> Tensor out"
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
    stride=(1, 1),
    padding=(0, 0),
    pool_kernel=(3, 3),
    pool_stride=(2, 2),
    pool_padding=(1, 1),
) -> Tensor:
    vectors = bias, mean, var, gamma, beta, eps
    y = conv_norm_add_relu.reference(x, weight, *vectors, stride=stride, padding=padding, relu=True)
    pooled_shape(y, pool_kernel, pool_stride, pool_padding)
    return channels_last(torch.nn.functional.max_pool2d(y, pool_kernel, pool_stride, pool_padding))


def _conv_shape(a) -> tuple[int, int, int, int]:
    return output_shape(a.x.shape, a.weight.shape, a.stride, a.padding, (1, 1))


def _shape(a) -> tuple[int, int, int, int]:
    z = torch.empty(_conv_shape(a), device="meta")
    return pooled_shape(z, a.pool_kernel, a.pool_stride, a.pool_padding)


@takes_arguments_of(reference)
def fake(a) -> Tensor:
    z = a.x.new_empty(_conv_shape(a))
    shape = pooled_shape(z, a.pool_kernel, a.pool_stride, a.pool_padding)
    return a.x.new_empty_strided(shape, channels_last_strides(shape))


@takes_arguments_of(reference)
def bytes(a) -> int:
    """One read of `x` and `weight`, one write of `out`."""
    return nbytes(a.x, a.weight) + math.prod(_shape(a)) * a.x.element_size()


@takes_arguments_of(reference)
def flops(a) -> int:
    """Two per multiply-add of the convolution; what follows is not counted."""
    return 2 * math.prod(_conv_shape(a)) * a.weight[0].numel()


OP = define(
    "conv_norm_relu_pool",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    ulps=4,
)
