"""First convolution of a dense layer: 1x1, of a lazy prefix of the block's buffer, with the statistics of its result.

Formula (x^ as in :mod:`.lazy`)::

    x^       = relu(scale[c]*x + shift[c])
    z        = x^ W'                               rounded to the dtype of x
    mean, m2 = bn_stats(z)                         with `statistics`, of z as rounded; else empty

`x`: ``[N, C, H, W]``, channels_last or a slice (:func:`.contract.is_slice`); `weight`: ``[K, C, 1, 1]`` of the same
dtype: float32 (float64, bfloat16 and float16 by the reference); `scale`, `shift`: ``[C]``, in the dtype of statistics.
`z`: ``[N, K, H, W]``, channels_last; `mean`, `m2`: ``[K]``, in the dtype of statistics.
"""

from __future__ import annotations

import math

from . import bn_stats, lazy
from .contract import Tensor, channels_last, channels_last_strides, define, nbytes, one_more_for_sums, stat_dtype

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, bool statistics=True) -> (Tensor z, Tensor mean, Tensor m2)"
)
FORMS = "x:~C weight:KxC scale,shift:C"


def reference(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    z = channels_last(lazy.product(lazy.activation(x, scale, shift), weight).to(x.dtype))
    empty = z.new_empty(0, dtype=stat_dtype(z.dtype))
    return (z, *bn_stats.reference(z)[:2]) if statistics else (z, empty, empty.clone())


def _shape(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], weight.shape[0], *x.shape[2:]


def fake(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _shape(x, weight)
    mean, m2 = (x.new_empty(shape[1] if statistics else 0, dtype=stat_dtype(x.dtype)) for _ in range(2))
    return x.new_empty_strided(shape, channels_last_strides(shape)), mean, m2


def bytes(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, statistics: bool = True) -> int:
    """One read of `x` and `weight`, one write of `z`."""
    return nbytes(x, weight) + math.prod(_shape(x, weight)) * x.element_size()


def flops(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, statistics: bool = True) -> int:
    """Two per multiply-add of the convolution; prologue and epilogue are not counted."""
    return 2 * math.prod(_shape(x, weight)) * x.shape[1]


OP = define(
    "dense_conv1x1",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=one_more_for_sums,
    sums_of_rounded=True,
    ulps=4,
)
