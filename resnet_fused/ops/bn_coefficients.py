"""Batch norm's backward as a multiply-add, from two sums over the batch: its per-channel arithmetic.

Formula (all per channel; M = pixels of z; sum_g = sum g and sum_gz = sum g*(z - mean), of whichever op wrote the
gradient g at batch norm's output; `rstd`, `scale`: of :mod:`.bn_affine`)::

    grad_gamma = rstd*sum_gz
    b = -scale*rstd*grad_gamma/M          M = 0: 0
    d = -b*mean - scale*sum_g/M           M = 0: 0

so that the gradient at batch norm's input is ``scale*g + b*z + d`` (:mod:`.lazy_grad_apply`). beta's is sum_g.

Ops that sum the gradient that they write take rstd too, and with it return these three in the place of sum_gz
(:func:`after`): a GPU starts one kernel less.

All vectors: ``[C]``, float32 (float64 by the reference). `z`: ``[N, C', H, W]``; only N, H and W are read. d is of
b as rounded, so that the rounding of b is of no weight where z is near its mean.
"""

from __future__ import annotations

import torch

from .contract import Tensor, define, nbytes

SCHEMA = (
    "(Tensor sum_g, Tensor sum_gz, Tensor mean, Tensor rstd, Tensor scale, Tensor z) -> "
    "(Tensor b, Tensor d, Tensor grad_gamma)"
)
FORMS = "sum_g,sum_gz,mean,rstd,scale:C z:~Z"


def reference(
    sum_g: Tensor, sum_gz: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    count = z.shape[0] * z.shape[2] * z.shape[3]
    grad_gamma = rstd * sum_gz
    if count == 0:
        return torch.zeros_like(sum_g), torch.zeros_like(sum_g), grad_gamma
    unit = scale / count
    b = -unit * (rstd * grad_gamma)
    return b, torch.addcmul(-unit * sum_g, b, mean, value=-1), grad_gamma


def fake(
    sum_g: Tensor, sum_gz: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(sum_g.new_empty(sum_g.shape) for _ in range(3))


#: Of an op that sums the gradient before a batch norm: its last results.
RESULTS = "Tensor sum_g, Tensor sum_gx, Tensor b, Tensor d, Tensor grad_gamma"


def after(
    sum_g: Tensor, sum_gx: Tensor, mean: Tensor | None, rstd: Tensor | None, scale: Tensor | None, z: Tensor | None
) -> tuple[Tensor, ...]:
    """:data:`RESULTS` of an op that found both sums: with `rstd` the results of this op, and sum_gx empty."""
    none = sum_g.new_empty(0)
    if rstd is None:
        return sum_g, sum_gx, *(none.clone() for _ in range(3))
    return sum_g, none, *reference(sum_g, sum_gx, mean, rstd, scale, z)


def fake_after(sum_g: Tensor, rstd: Tensor | None) -> tuple[Tensor, ...]:
    """:data:`RESULTS` in the form of `sum_g`."""
    c, there = sum_g.shape[0], rstd is not None
    return sum_g, sum_g.new_empty(0 if there else c), *(sum_g.new_empty(c if there else 0) for _ in range(3))


def bytes(sum_g, sum_gz, mean, rstd, scale, z):
    """One read of five vectors, one write of three."""
    return 8 * nbytes(sum_g)


def flops(sum_g, sum_gz, mean, rstd, scale, z):
    """Two per multiply-add; a division is one."""
    return 7 * sum_g.numel()


OP = define(
    "bn_coefficients",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    small=True,
    compiled=True,
    vectors=True,
    forms=FORMS,
)
