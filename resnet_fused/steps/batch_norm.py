"""Batch norm as two values: an affine map forward, an affine map of (gradient, z) backward.

Forward (Ioffe and Szegedy 2015)::

    rstd = 1 / sqrt(var + eps);  scale = gamma * rstd;  shift = beta - mean * scale
    bn(z) = scale * z + shift

Backward, with g the gradient at batch norm's output and M the values per channel::

    grad_beta  = sum g
    grad_gamma = rstd * (sum g*z - mean * sum g)
    dz = a*g + b*z + d,  a = scale,  b = -scale * rstd * grad_gamma / M,
                         d = scale * (mean * rstd * grad_gamma - grad_beta) / M

With running statistics nothing depends on the batch: b = d = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..ops import stat_dtype
from .spec import Norm, StepTensors

Tensor = torch.Tensor


class Affine(NamedTuple):
    """Batch norm of one tensor as a multiply-add, with what its backward needs; all ``[C]``."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


class Coefficients(NamedTuple):
    """Batch norm's backward: ``dz = a*g + b*z + d`` (b and d None: 0) and its parameter gradients; all ``[C]``."""

    a: Tensor
    b: Tensor | None
    d: Tensor | None
    grad_gamma: Tensor
    grad_beta: Tensor


def affine(mean: Tensor, var: Tensor, tensors: StepTensors, eps: float) -> Affine:
    """Scale and shift of a batch norm from its statistics. Absent gamma and beta are 1 and 0."""
    rstd = (var + eps).rsqrt()
    scale = rstd if tensors.gamma is None else tensors.gamma.to(rstd.dtype) * rstd
    shift = -mean * scale if tensors.beta is None else torch.addcmul(tensors.beta.to(rstd.dtype), mean, scale, value=-1)
    return Affine(mean, rstd, scale, shift)


def running_affine(tensors: StepTensors, norm: Norm, dtype: torch.dtype) -> Affine:
    """Scale and shift from the running statistics, for activations of `dtype`."""
    stat = stat_dtype(dtype)
    return affine(tensors.running_mean.to(stat, copy=True), tensors.running_var.to(stat), tensors, norm.eps)


def coefficients(bn: Affine, sum_g: Tensor, sum_gz: Tensor, count: int, norm: Norm) -> Coefficients:
    """The backward's affine map from the two sums that the kernel which wrote `g` emitted."""
    grad_gamma = bn.rstd * torch.addcmul(sum_gz, bn.mean, sum_g, value=-1)
    if not norm.batch_stats:
        return Coefficients(bn.scale, None, None, grad_gamma, sum_g)
    slope = bn.rstd * grad_gamma
    unit = bn.scale / count
    return Coefficients(bn.scale, -unit * slope, unit * torch.addcmul(-sum_g, bn.mean, slope), grad_gamma, sum_g)


def update_running(tensors: StepTensors, norm: Norm, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics as stock does: unbiased variance, ``momentum=None`` a cumulative average."""
    if tensors.num_batches_tracked is not None:
        tensors.num_batches_tracked.add_(1)
    if tensors.running_mean is None or count == 0:
        return
    if norm.momentum is None:
        weight = 1.0 / tensors.num_batches_tracked.to(mean.dtype)
    else:
        weight = norm.momentum
    unbiased = var * (count / max(count - 1, 1))
    for running, batch in ((tensors.running_mean, mean), (tensors.running_var, unbiased)):
        if isinstance(weight, float):
            running.mul_(1 - weight).add_(batch.to(running.dtype), alpha=weight)
        else:
            running.add_(weight * (batch - running))
