"""Write a dense block's input into the block's buffer, with its batch statistics: one read, one write.

Formula::

    out      = x
    mean, m2 = bn_stats(x)

`x`: ``[N, C, H, W]``, channels_last; `out`: the same shape and dtype, channels_last or a slice
(:func:`.contract.is_slice`), without memory in common. float32 (float64, bfloat16 and float16 by the reference).
`mean`, `m2`: ``[C]``, in the dtype of statistics.
"""

from __future__ import annotations

from . import bn_stats
from .contract import Tensor, define, nbytes, two_launches

SCHEMA = "(Tensor x, Tensor(a!) out) -> (Tensor mean, Tensor m2)"
FORMS = "x,out:~C"


def reference(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    out.copy_(x)
    return bn_stats.reference(x)[:2]


def fake(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return bn_stats.fake(x)[:2]


def bytes(x: Tensor, out: Tensor) -> int:
    """One read of `x`, one write of `out`."""
    return nbytes(x, out)


def flops(x: Tensor, out: Tensor) -> int:
    return 3 * x.numel()


OP = define(
    "dense_enter",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=two_launches,
)
