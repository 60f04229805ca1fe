"""`bn_affine` in Triton: one launch, one channel a thread.

Bytes: 28 a channel, 8 more with gamma and beta; with 2048 channels 74 kB, 22 ns of an H100's bandwidth. What counts is
the launch, which stands for about twenty of PyTorch's. Not measured on hardware.

`eps` is a constexpr: a network has one or two, and each costs one compilation. Quotients and the root are rounded to
nearest (`div_rn`, `sqrt_rn`): at a thread a channel they cost nothing, and everything that follows is scaled by rstd.
"""

from __future__ import annotations

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
    sigma = tl.full((BLOCK_C,), 1.0, tl.float32)
    mu = tl.zeros((BLOCK_C,), tl.float32)
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
