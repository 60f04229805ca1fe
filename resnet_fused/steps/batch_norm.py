"""Batch norm as two values: an affine map forward, an affine map of (gradient, z) backward.

Forward (Ioffe and Szegedy 2015)::

    rstd = 1 / sqrt(var + eps);  scale = gamma * rstd;  shift = beta - mean * scale
    bn(z) = scale * z + shift

Backward, with g the gradient at batch norm's output and M the values per channel::

    grad_beta  = sum g
    grad_gamma = rstd * sum g*(z - mean)
    dz = a*g + b*z + d,  a = scale,  b = -scale * rstd * grad_gamma / M,
                         d = -b*mean - scale * grad_beta / M

The kernels that write g subtract the mean before they sum: sum g*z - mean * sum g would lose as many digits as the mean
has more than the deviation. With running statistics nothing depends on the batch: b = d = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import run, tape
from ..ops import stat_dtype
from .spec import Norm, StepTensors


class Affine(NamedTuple):
    """Batch norm of one tensor as a multiply-add, with what its backward needs; all ``[C]``."""

    mean: Tensor
    rstd: Tensor | None  # None: of no norm, see `lazy.as_it_is`
    scale: Tensor
    shift: Tensor
    centre: Tensor | None = None  # about the mean of the activation behind it, see `ops.bn_affine`; None: not known


class Statistics(NamedTuple):
    """Batch statistics on their way to the running ones; all ``[C]``, `count` the values per channel."""

    mean: Tensor
    var: Tensor
    count: int


def pixels(shape: torch.Size) -> int:
    """Values per channel of ``[N, C, H, W]``."""
    return shape[0] * shape[2] * shape[3]


class Coefficients(NamedTuple):
    """Batch norm's backward: ``dz = a*g + b*z + d`` (None: 1, 0 and 0) and its parameter gradients; all ``[C]``."""

    a: Tensor | None = None
    b: Tensor | None = None
    d: Tensor | None = None
    grad_gamma: Tensor | None = None
    grad_beta: Tensor | None = None


def batch_affine(
    mean: Tensor, m2: Tensor, tensors: StepTensors, norm: Norm, z: Tensor, backend: str
) -> tuple[Affine, Statistics]:
    """Batch norm from the statistics of a batch. `z`: any tensor of as many pixels."""
    var, *vectors = run("bn_affine", mean, m2, tensors.gamma, tensors.beta, z, norm.eps, backend=backend)
    return Affine(mean, *vectors), Statistics(mean, var, pixels(z.shape))


def affine_of(results: Sequence[Tensor], z: Tensor) -> tuple[Affine, Statistics]:
    """Batch norm from what an op that takes statistics returned, having been given `parameters`. `z`: as above."""
    mean, _, var, *vectors = results
    return Affine(mean, *vectors), Statistics(mean, var, pixels(z.shape))


def parameters(tensors: StepTensors, norm: Norm) -> dict:
    """The arguments with which an op that takes statistics returns what :func:`affine_of` wants."""
    return {"gamma": tensors.gamma, "beta": tensors.beta, "eps": norm.eps}


def normalise(z: Tensor, tensors: StepTensors, norm: Norm, backend: str) -> tuple[Affine, Statistics | None]:
    """Batch norm of `z` as an affine map, from its own statistics or from the running ones."""
    if not norm.batch_stats:
        return running_affine(tensors, norm, z.dtype, backend), None
    return affine_of(run("bn_stats", z, **parameters(tensors, norm), backend=backend), z)


def running_affine(
    tensors: StepTensors, norm: Norm, dtype: torch.dtype, backend: str = "auto", bias: Tensor | None = None
) -> Affine:
    """Batch norm from the running statistics, for activations of `dtype`. Absent gamma and beta are 1 and 0.

    `bias`: of the convolution before it, if its output lacks it.
    """
    running, stat = (tensors.running_mean, tensors.running_var), stat_dtype(dtype)
    if stat_dtype(running[0].dtype) != stat or running[1].dtype != running[0].dtype:
        running = [t.to(stat) for t in running]
    return Affine(*run("running_affine", *running, tensors.gamma, tensors.beta, bias, norm.eps, backend=backend))


def coefficients(bn: Affine, sum_g: Tensor, sum_gz: Tensor, z: Tensor, norm: Norm, backend: str) -> Coefficients:
    """The backward's affine map from the two sums that the kernel which wrote `g` emitted. `z`: for its pixels."""
    if not norm.batch_stats:
        return Coefficients(bn.scale, None, None, bn.rstd * sum_gz, sum_g)
    b, d, grad_gamma = run("bn_coefficients", sum_g, sum_gz, bn.mean, bn.rstd, bn.scale, z, backend=backend)
    return Coefficients(bn.scale, b, d, grad_gamma, sum_g)


def silent(t: Tensor) -> Tensor:
    """`t` for a write that autograd does not see, as stock's batch norm writes its running statistics.

    An alias with a version counter of its own: a graph that has saved `t` (two forwards and one backward) goes on to
    backward. Traced code and subclasses see the write as one to `t`.
    """
    if torch.compiler.is_compiling() or type(t) not in (Tensor, torch.nn.Parameter):
        return t
    return tape.noted(_data, t)


def _data(t: Tensor) -> Tensor:
    return t.data


def update_running(tensors: StepTensors, norm: Norm, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics as stock does: unbiased variance, ``momentum=None`` a cumulative average."""
    if tensors.num_batches_tracked is not None:
        tensors.num_batches_tracked.add_(1)
    if tensors.running_mean is None or count == 0:
        return
    if norm.momentum is not None:
        weight = float(norm.momentum)
    elif tensors.num_batches_tracked is None:
        return  # stock weighs the batch with 0
    else:
        weight = 1.0 / tensors.num_batches_tracked.to(mean.dtype)
    unbiased = var * (count / max(count - 1, 1))
    for running, batch in ((tensors.running_mean, mean), (tensors.running_var, unbiased)):
        if isinstance(weight, float):
            silent(running).mul_(1 - weight).add_(batch.to(running.dtype), alpha=weight)
        else:
            silent(running).mul_(1 - weight).add_(batch * weight)
