"""A grouped 3x3 convolution with padding 1, or its input's gradient, and the batch statistics of what it makes.

Formula, with groups of as many outputs as inputs, ``weight.shape[1]``::

    z = conv2d(x, weight, stride=stride, padding=1, groups=groups)
        transposed: the gradient of its input, of which `x` is that of its output
    mean[k] = 1/M * sum_m z[m, k]                 M = pixels of z; 0 for M = 0
    m2[k]   = sum_m (z[m, k] - mean[k])**2        both as of `bn_stats`; empty without `statistics`

`x`: ``[N, C, H, W]``, channels_last; `weight`: ``[C, width, 3, 3]`` of any strides; float32; `stride`: 1 or 2. `z`:
``[N, C, (H-1)//stride+1, (W-1)//stride+1]``, or if transposed ``[N, C, (H-1)*stride+1, (W-1)*stride+1]`` and
`output_padding`, 0 or 1 with stride 2, more: of two sizes that a strided convolution maps to one, the one. `mean`,
`m2`: ``[C]``.
"""

from __future__ import annotations

import torch

from . import bn_stats
from .contract import Tensor, channels_last, channels_last_strides, define, nbytes, one_more_for_sums, stat_dtype

SCHEMA = (
    "(Tensor x, Tensor weight, int stride=1, bool transposed=False, bool statistics=False, "
    "int[2] output_padding=0) -> (Tensor z, Tensor mean, Tensor m2)"
)


def reference(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    transposed: bool = False,
    statistics: bool = False,
    output_padding=(0, 0),
) -> tuple[Tensor, Tensor, Tensor]:
    groups = x.shape[1] // weight.shape[1]
    if transposed:
        more = tuple(output_padding)
        z = torch.nn.functional.conv_transpose2d(x, weight, None, stride, 1, more, groups)
    else:
        z = torch.nn.functional.conv2d(x, weight, None, stride, 1, 1, groups)
    z = channels_last(z)
    empty = z.new_empty(0, dtype=stat_dtype(z.dtype))
    return (z, *bn_stats.reference(z)[:2]) if statistics else (z, empty, empty.clone())


def fake(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    transposed: bool = False,
    statistics: bool = False,
    output_padding=(0, 0),
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _shape(x, stride, transposed, output_padding)
    mean, m2 = (x.new_empty(shape[1] if statistics else 0, dtype=stat_dtype(x.dtype)) for _ in range(2))
    return x.new_empty_strided(shape, channels_last_strides(shape)), mean, m2


def _shape(x: Tensor, stride: int, transposed: bool, output_padding) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    if transposed:
        return n, c, (h - 1) * stride + 1 + output_padding[0], (w - 1) * stride + 1 + output_padding[1]
    return n, c, (h - 1) // stride + 1, (w - 1) // stride + 1


def bytes(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    transposed: bool = False,
    statistics: bool = False,
    output_padding=(0, 0),
) -> int:
    """One read of `x` and `weight`, one write of `z`."""
    n, c, p, q = _shape(x, stride, transposed, output_padding)
    return nbytes(x, weight) + n * c * p * q * x.element_size()


def flops(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    transposed: bool = False,
    statistics: bool = False,
    output_padding=(0, 0),
) -> int:
    """Two per multiply-add, padding's included, and three per value for statistics."""
    n, c, p, q = _shape(x, stride, transposed, output_padding)
    pixels = x.shape[0] * x.shape[2] * x.shape[3] if transposed else n * p * q
    return 2 * pixels * weight.numel() + (3 * n * c * p * q if statistics else 0)


OP = define(
    "grouped_conv3x3",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    launches=one_more_for_sums,
    sums_of_rounded=True,
)
