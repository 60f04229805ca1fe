"""`bn_affine` in Triton: one launch, one channel a thread.

Bytes: 28 a channel, 8 more with gamma and beta; with 2048 channels 74 kB, 22 ns of an H100's bandwidth. What counts is
the launch, which stands for about twenty of PyTorch's. Not measured on hardware.

`eps` is a constexpr: a network has one or two, and each costs one compilation. Quotients and the root are rounded to
nearest (`div_rn`, `sqrt_rn`): at a thread a channel they cost nothing, and everything that follows is scaled by rstd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...ops import bn_affine as op
from ...ops.contract import Tensor
from . import checks, common
from .common import widen

BLOCK_C = 128
_ROOT_HALF = tl.constexpr(0.5**0.5)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def relu_mean(mu, sigma):
    """Mean of the ReLU of a normal deviate; 0 where it is not finite."""
    t = tl.div_rn(mu, tl.where(sigma < 1e-12, 1e-12, sigma))
    centre = mu * 0.5 * (1 + tl.erf(t * _ROOT_HALF)) + sigma * (tl.exp(-0.5 * t * t) * _DENSITY)
    return tl.where(tl.abs(centre) < _INFINITY, centre, 0.0)


@triton.jit
def store_affine(
    mean, m2, M, cols, in_cols,  # of the channels `cols`: mean and second moment of M pixels
    gamma_ptr, beta_ptr,  # [C], or None
    var_ptr, rstd_ptr, scale_ptr, shift_ptr, centre_ptr,  # [C]
    EPS: tl.constexpr,
):  # fmt: skip
    """What this op makes of statistics that are in registers."""
    sigma = tl.full(mean.shape, 1.0, tl.float32)
    mu = tl.zeros(mean.shape, tl.float32)
    if beta_ptr is not None:
        mu = widen(tl.load(beta_ptr + cols, mask=in_cols, other=0.0))
    var = tl.where(M > 0, tl.div_rn(m2, tl.maximum(M, 1).to(tl.float32)), 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + EPS))
    scale = rstd
    if gamma_ptr is not None:
        gamma = widen(tl.load(gamma_ptr + cols, mask=in_cols, other=0.0))
        scale = gamma * rstd
        sigma = tl.abs(gamma)
    tl.store(var_ptr + cols, var, mask=in_cols)
    tl.store(rstd_ptr + cols, rstd, mask=in_cols)
    tl.store(scale_ptr + cols, scale, mask=in_cols)
    tl.store(shift_ptr + cols, tl.fma(-mean, scale, mu), mask=in_cols)
    tl.store(centre_ptr + cols, relu_mean(mu, sigma), mask=in_cols)


@triton.jit
def store_statistics(
    mean, m2, M, cols, in_cols, mean_ptr, m2_ptr, gamma_ptr, beta_ptr,
    var_ptr, rstd_ptr, scale_ptr, shift_ptr, centre_ptr, EPS: tl.constexpr,
):  # fmt: skip
    """The results of an op that takes statistics: the mean, and the second moment or what this op makes of both."""
    tl.store(mean_ptr + cols, mean, mask=in_cols)
    if m2_ptr is not None:
        tl.store(m2_ptr + cols, m2, mask=in_cols)
    else:
        store_affine(mean, m2, M, cols, in_cols, gamma_ptr, beta_ptr,
                     var_ptr, rstd_ptr, scale_ptr, shift_ptr, centre_ptr, EPS)  # fmt: skip


@triton.jit(do_not_specialize=["M", "C"])
def bn_affine_kernel(
    mean_ptr, m2_ptr, gamma_ptr, beta_ptr,  # [C]; gamma, beta: or None
    var_ptr, rstd_ptr, scale_ptr, shift_ptr, centre_ptr,  # [C]
    M, C,
    EPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    mean = tl.load(mean_ptr + cols, mask=in_cols, other=0.0)
    m2 = tl.load(m2_ptr + cols, mask=in_cols, other=0.0)
    store_affine(mean, m2, M, cols, in_cols, gamma_ptr, beta_ptr,
                 var_ptr, rstd_ptr, scale_ptr, shift_ptr, centre_ptr, EPS)  # fmt: skip


# For ops that take statistics -----------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """Where an op that takes statistics stores them, and the parameters that it does so with."""

    results: tuple[Tensor, ...]  # `op.RESULTS`
    parameters: tuple[Tensor | None, Tensor | None]
    eps: float | None

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """Of :func:`store_statistics`, from `mean_ptr` to `centre_ptr`."""
        mean, m2, *affine = self.results
        if self.eps is None:
            return mean, m2, None, None, *(None for _ in affine)
        return mean, None, *self.parameters, *affine

    def of_nothing(self, z: Tensor) -> tuple[Tensor, ...]:
        """The results where there is nothing to sum."""
        mean, m2, *affine = self.results
        mean.zero_()
        if self.eps is not None:
            affine = run(mean, torch.zeros_like(mean), *self.parameters, z, self.eps)
        return mean, m2.zero_(), *affine


def outputs(name: str, like: Tensor, c: int, gamma: Tensor | None, beta: Tensor | None, eps: float | None) -> Outputs:
    """Of the op `name` for `c` channels, on the device of `like`. Raises RuntimeError on parameters that do not fit."""
    affine = eps is not None
    if not affine and not (gamma is None and beta is None):
        checks.fail(name, "got gamma or beta without eps; pass eps too")
    vectors = [like.new_empty(c if there else 0, dtype=torch.float32) for there in (True, not affine, *[affine] * 5)]
    gamma, beta = (None if t is None else t.contiguous() for t in (gamma, beta))
    checks.vectors(name, {"mean": vectors[0], "gamma": gamma, "beta": beta}, checks.PARAMETER_DTYPES)
    return Outputs(tuple(vectors), (gamma, beta), eps)


def run(mean: Tensor, m2: Tensor, gamma: Tensor | None, beta: Tensor | None, z: Tensor, eps: float) -> op.Vectors:
    """See :mod:`resnet_fused.ops.bn_affine`. Raises RuntimeError on arguments that do not fit."""
    name = "bn_affine"
    # Parameters are the user's: strided ones are copied.
    gamma, beta = (None if t is None else t.contiguous() for t in (gamma, beta))
    checks.vectors(name, {"mean": mean, "m2": m2})
    checks.vectors(name, {"mean": mean, "gamma": gamma, "beta": beta}, checks.PARAMETER_DTYPES)
    pixels = checks.pixels(name, "z", z)
    results = tuple(torch.empty_like(mean) for _ in range(5))
    c = mean.shape[0]
    if c:
        sizes = {"M": pixels, "C": c, "EPS": eps, "BLOCK_C": BLOCK_C}
        common.start(bn_affine_kernel, common.cdiv(c, BLOCK_C), mean, m2, gamma, beta, *results, **sizes)
    return results


KERNEL = common.register(op.OP, run)
