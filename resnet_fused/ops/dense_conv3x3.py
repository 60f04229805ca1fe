"""Second convolution of a dense layer: 3x3, of a lazy tensor, into its slice of the block's buffer, with statistics.

Formula (z^ as in :mod:`.lazy`)::

    z^       = relu(scale[k]*z + shift[k])
    out      = conv2d(z^, weight, padding=1)       rounded to the dtype of z
    mean, m2 = bn_stats(out)                       with `statistics`, of out as rounded; else empty

By Winograd's minimal filtering F(2x2, 3x3), as :mod:`.winograd_conv3x3`: where any output is not finite, all are those
of a direct sum.

`z`: ``[N, K, H, W]``, channels_last; `weight`: ``[G, K, 3, 3]`` of the same dtype, of any strides: float32 (float64,
bfloat16 and float16 by the reference); `scale`, `shift`: ``[K]``, in the dtype of statistics. `out`: ``[N, G, H, W]``,
of the dtype of z, channels_last or a slice (:func:`.contract.is_slice`), without memory in common with z. `mean`, `m2`:
``[G]``, in the dtype of statistics.
"""

from __future__ import annotations

import torch

from . import bn_stats, lazy
from .contract import Tensor, define, nbytes, one_more_for_statistics, stat_dtype

SCHEMA = (
    "(Tensor z, Tensor weight, Tensor scale, Tensor shift, Tensor(a!) out, bool statistics=True) "
    "-> (Tensor mean, Tensor m2)"
)
FORMS = "z:~K weight:GxKx3 scale,shift:K out:~G"


def reference(
    z: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out: Tensor, statistics: bool = True
) -> tuple[Tensor, Tensor]:
    out.copy_(torch.nn.functional.conv2d(lazy.activation(z, scale, shift), weight, padding=1))
    empty = out.new_empty(0, dtype=stat_dtype(out.dtype))
    return bn_stats.reference(out)[:2] if statistics else (empty, empty.clone())


def fake(
    z: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out: Tensor, statistics: bool = True
) -> tuple[Tensor, Tensor]:
    mean, m2 = (out.new_empty(out.shape[1] if statistics else 0, dtype=stat_dtype(out.dtype)) for _ in range(2))
    return mean, m2


def bytes(z: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out: Tensor, statistics: bool = True) -> int:
    """One read of `z` and `weight`, one write of `out`."""
    return nbytes(z, weight, out)


def flops(z: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out: Tensor, statistics: bool = True) -> int:
    """Those of the direct sum, two per multiply-add, whatever fewer the algorithm gets by with."""
    return 2 * out.numel() * 9 * z.shape[1]


OP = define(
    "dense_conv3x3",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=one_more_for_statistics,
    sums_of_rounded=True,
    ulps=4,
)
