"""A dense 3x3 convolution of stride 1, or its input's gradient, and the batch statistics of what it makes.

Formula, with p = padding, 0 or 1::

    z = conv2d(x, weight, padding=p)              transposed: the x whose conv2d(., weight, padding=p) has gradient x
    mean[k] = 1/M * sum_m z[m, k]                 M = pixels of z; 0 for M = 0
    m2[k]   = sum_m (z[m, k] - mean[k])**2        both as of `bn_stats`; empty without `statistics`

By Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016): 16 multiplications where a direct sum has 36. Every
output is made of exactly the inputs that a direct sum has, so zeros stay zeros. A transform may overflow where the
direct sum does not: where any output is not finite, all are ATen's. With ``outputs=4`` by F(4x4, 3x3), see
`winograd_conv3x3_add_relu`: 36 multiplications where a direct sum has 144, and more rounding error.

`x`: ``[N, C, H, W]``, channels_last; `weight`: ``[K, C, 3, 3]``, or ``[C, K, 3, 3]`` if transposed, of any strides;
float32. `z`: ``[N, K, H+2p-2, W+2p-2]``, or ``[N, K, H+2-2p, W+2-2p]``, channels_last; `mean`, `m2`: ``[K]``.
"""

from __future__ import annotations

import torch

from . import bn_stats
from .contract import Tensor, channels_last, channels_last_strides, define, nbytes, one_more_for_sums, stat_dtype

SCHEMA = (
    "(Tensor x, Tensor weight, int padding=1, bool transposed=False, bool statistics=False, "
    "int outputs=2) -> (Tensor z, Tensor mean, Tensor m2)"
)


def reference(
    x: Tensor, weight: Tensor, padding: int = 1, transposed: bool = False, statistics: bool = False, outputs: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    convolve = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    z = channels_last(convolve(x, weight, padding=padding))
    empty = z.new_empty(0, dtype=stat_dtype(z.dtype))
    return (z, *bn_stats.reference(z)[:2]) if statistics else (z, empty, empty.clone())


def fake(
    x: Tensor, weight: Tensor, padding: int = 1, transposed: bool = False, statistics: bool = False, outputs: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _shape(x, weight, padding, transposed)
    mean, m2 = (x.new_empty(shape[1] if statistics else 0, dtype=stat_dtype(x.dtype)) for _ in range(2))
    return x.new_empty_strided(shape, channels_last_strides(shape)), mean, m2


def _shape(x: Tensor, weight: Tensor, padding: int, transposed: bool) -> tuple[int, int, int, int]:
    n, _, h, w = x.shape
    grows = 2 - 2 * padding if transposed else 2 * padding - 2
    return n, weight.shape[1 if transposed else 0], h + grows, w + grows


def bytes(
    x: Tensor, weight: Tensor, padding: int = 1, transposed: bool = False, statistics: bool = False, outputs: int = 2
) -> int:
    """One read of `x` and `weight`, one write of `z`."""
    n, k, p, q = _shape(x, weight, padding, transposed)
    return nbytes(x, weight) + n * k * p * q * x.element_size()


def flops(
    x: Tensor, weight: Tensor, padding: int = 1, transposed: bool = False, statistics: bool = False, outputs: int = 2
) -> int:
    """Those of the direct sum, two per multiply-add, whatever fewer the algorithm gets by with."""
    n, k, p, q = _shape(x, weight, padding, transposed)
    pixels = x.shape[0] * x.shape[2] * x.shape[3] if transposed else n * p * q
    return 2 * pixels * weight.numel() + (3 * n * k * p * q if statistics else 0)


OP = define(
    "winograd_conv3x3",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    launches=one_more_for_sums,
    sums_of_rounded=True,
)
