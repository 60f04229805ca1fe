"""A sum in place, and its batch statistics: what a block of identity mappings ends in and the next begins with.

Formula (f = sample_factor[n], absent: 1; M = N*H*W)::

    out     <- f * out + other
    mean[c] = 1/M * sum_m out[m, c]
    m2[c]   = sum_m (out[m, c] - mean[c])**2

The statistics are those of what was written, rounded to its dtype, and merged as by `bn_stats`. For M = 0 both are 0.
`out`, `other`: ``[N, C, H, W]``, one dtype of float32, bfloat16, float16 (float64 on the CPU), channels_last, without
memory in common. `sample_factor`: ``[N]``; `mean`, `m2`: ``[C]``; float32 (float64 for float64).
"""

from __future__ import annotations

from . import bn_stats
from .contract import Tensor, define, nbytes, per_sample, two_launches

SCHEMA = "(Tensor(a!) out, Tensor other, Tensor? sample_factor=None) -> (Tensor mean, Tensor m2)"


def reference(out: Tensor, other: Tensor, sample_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if sample_factor is None:
        out.add_(other)
    else:
        out.copy_(out.to(sample_factor.dtype) * per_sample(sample_factor) + other)
    return bn_stats.reference(out)[:2]


def fake(out: Tensor, other: Tensor, sample_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return bn_stats.fake(out)[:2]


def bytes(out: Tensor, other: Tensor, sample_factor: Tensor | None = None) -> int:
    """One read of both, one write of `out`."""
    return 2 * nbytes(out) + nbytes(other)


def flops(out: Tensor, other: Tensor, sample_factor: Tensor | None = None) -> int:
    return (4 if sample_factor is None else 5) * out.numel()


OP = define(
    "add_stats_",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    launches=two_launches,
    sums_of_rounded=True,
)
