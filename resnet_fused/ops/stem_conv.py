"""A dense convolution of few input channels, as networks begin with, and the batch statistics of what it makes.

Formula::

    z = conv2d(x, weight, stride, padding)
    mean[k] = 1/M * sum_m z[m, k]                 M = pixels of z; 0 for M = 0
    m2[k]   = sum_m (z[m, k] - mean[k])**2        both as of `bn_stats`; empty without `statistics`

`x`: ``[N, C, H, W]``, channels_last; `weight`: ``[K, C, R, S]``, of any strides; float32. `z`: ``[N, K, P, Q]``,
channels_last; `mean`, `m2`: ``[K]``. Any number of channels is taken, but the loops are made for up to 4: vectors hold
output channels, and the inputs under a row of the filter are a run of memory.
"""

from __future__ import annotations

import math

import torch

from . import bn_stats
from .contract import (
    Tensor,
    channels_last,
    channels_last_strides,
    define,
    nbytes,
    one_more_for_sums,
    stat_dtype,
    takes_arguments_of,
)
from .conv_add_relu import output_shape

SCHEMA = (
    "(Tensor x, Tensor weight, int[2] stride=1, int[2] padding=0, bool statistics=False) "
    "-> (Tensor z, Tensor mean, Tensor m2)"
)


def reference(
    x: Tensor, weight: Tensor, stride=(1, 1), padding=(0, 0), statistics: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    z = channels_last(torch.conv2d(x, weight, None, stride, padding))
    empty = z.new_empty(0, dtype=stat_dtype(z.dtype))
    return (z, *bn_stats.reference(z)[:2]) if statistics else (z, empty, empty.clone())


def _shape(a) -> tuple[int, int, int, int]:
    return output_shape(a.x.shape, a.weight.shape, a.stride, a.padding, (1, 1))


@takes_arguments_of(reference)
def fake(a) -> tuple[Tensor, Tensor, Tensor]:
    shape = _shape(a)
    mean, m2 = (a.x.new_empty(shape[1] if a.statistics else 0, dtype=stat_dtype(a.x.dtype)) for _ in range(2))
    return a.x.new_empty_strided(shape, channels_last_strides(shape)), mean, m2


@takes_arguments_of(reference)
def bytes(a) -> int:
    """One read of `x` and `weight`, one write of `z`."""
    return nbytes(a.x, a.weight) + math.prod(_shape(a)) * a.x.element_size()


@takes_arguments_of(reference)
def flops(a) -> int:
    """Two per multiply-add, three per element of the statistics."""
    outputs = math.prod(_shape(a))
    return 2 * outputs * a.weight[0].numel() + (3 * outputs if a.statistics else 0)


OP = define(
    "stem_conv",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    launches=one_more_for_sums,
    sums_of_rounded=True,
    ulps=4,
)
