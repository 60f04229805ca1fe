"""Batch statistics of one tensor: mean and centred second moment per channel, or what batch norm makes of them.

Formula (z is ``[N, C, H, W]``, M = N*H*W)::

    mean[c] = 1/M * sum_m z[m, c]
    m2[c]   = sum_m (z[m, c] - mean[c])**2

With `eps` the results of :mod:`.bn_affine` instead of m2, which is then empty, as they are without it.

Merged over tiles by Chan's rule (Chan, Golub, LeVeque 1979), never as ``E[z^2] - E[z]^2``. For M = 0 both are 0.
`z`: float32, bfloat16, float16 (float64 on the CPU), channels_last. `gamma`, `beta`: ``[C]``, any floating dtype.
Results: ``[C]``, float32 (float64 for float64).
"""

from __future__ import annotations

from . import bn_affine
from .contract import Tensor, define, nbytes, stat_dtype, two_launches

SCHEMA = f"(Tensor z, {bn_affine.PARAMETERS}) -> ({bn_affine.RESULTS})"
FORMS = "z:~C gamma,beta:C"


def reference(
    z: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, ...]:
    return bn_affine.after(*_moments(z), gamma, beta, z, eps)


def emitted(
    z: Tensor, emit_stats: bool, gamma: Tensor | None, beta: Tensor | None, eps: float | None
) -> tuple[Tensor, ...]:
    """The same of a convolution's result, by its reference; empty without `emit_stats`."""
    if emit_stats:
        return reference(z, gamma, beta, eps)
    return tuple(z.new_empty(0, dtype=stat_dtype(z.dtype)) for _ in range(7))


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    acc = z.to(stat_dtype(z.dtype))
    if z.numel() == 0:
        return acc.new_zeros(z.shape[1]), acc.new_zeros(z.shape[1])
    wide = acc.double() if acc.device.type == "cpu" else acc
    mean = wide.mean((0, 2, 3))
    m2 = (wide - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))
    return mean.to(acc.dtype), m2.to(acc.dtype)


def fake(
    z: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, ...]:
    return bn_affine.fake_after(z.new_empty(z.shape[1], dtype=stat_dtype(z.dtype)), eps)


def bytes(z: Tensor, gamma=None, beta=None, eps=None) -> int:
    return nbytes(z)


def flops(z: Tensor, gamma=None, beta=None, eps=None) -> int:
    return 3 * z.numel()


OP = define(
    "bn_stats",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=two_launches,
)
