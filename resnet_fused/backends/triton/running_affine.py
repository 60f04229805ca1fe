"""`running_affine` in Triton: one launch, one channel a thread.

Bytes: 24 a channel, up to 12 more with gamma, beta and a bias; with 2048 channels 74 kB, 22 ns of an H100's bandwidth.
What counts is the launch, which stands for five to eight of PyTorch's. Not measured on hardware.

`eps` is a constexpr, quotient and root are rounded to nearest: see :mod:`.bn_affine`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import running_affine as op
from ...ops.contract import DATA_DTYPES, Tensor
from . import checks, common
from .common import widen

BLOCK_C = 128


@triton.jit(do_not_specialize=["C"])
def running_affine_kernel(
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, bias_ptr,  # [C]; the last three: or None
    own_mean_ptr, rstd_ptr, scale_ptr, shift_ptr,  # [C]
    C,
    EPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    mean = widen(tl.load(mean_ptr + cols, mask=in_cols, other=0.0))
    var = widen(tl.load(var_ptr + cols, mask=in_cols, other=1.0))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + EPS))
    scale = rstd
    if gamma_ptr is not None:
        scale = widen(tl.load(gamma_ptr + cols, mask=in_cols, other=0.0)) * rstd
    offset = -mean
    if bias_ptr is not None:
        offset = widen(tl.load(bias_ptr + cols, mask=in_cols, other=0.0)) - mean
    beta = tl.zeros((BLOCK_C,), tl.float32)
    if beta_ptr is not None:
        beta = widen(tl.load(beta_ptr + cols, mask=in_cols, other=0.0))
    tl.store(own_mean_ptr + cols, mean, mask=in_cols)
    tl.store(rstd_ptr + cols, rstd, mask=in_cols)
    tl.store(scale_ptr + cols, scale, mask=in_cols)
    tl.store(shift_ptr + cols, tl.fma(offset, scale, beta), mask=in_cols)


def run(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, bias: Tensor | None, eps: float
) -> op.Vectors:
    """See :mod:`resnet_fused.ops.running_affine`. Raises RuntimeError on arguments that do not fit."""
    # All of them are the user's: strided ones are copied.
    mean, var, gamma, beta, bias = (None if t is None else t.contiguous() for t in (mean, var, gamma, beta, bias))
    checks.vectors("running_affine", {"mean": mean, "var": var}, DATA_DTYPES)
    parameters = {"mean": mean, "gamma": gamma, "beta": beta, "bias": bias}
    checks.vectors("running_affine", parameters, checks.PARAMETER_DTYPES)
    results = tuple(torch.empty_like(mean, dtype=torch.float32) for _ in range(4))
    c = mean.shape[0]
    if c:
        sizes = {"C": c, "EPS": eps, "BLOCK_C": BLOCK_C}
        common.start(running_affine_kernel, common.cdiv(c, BLOCK_C), mean, var, gamma, beta, bias, *results, **sizes)
    return results


KERNEL = common.register(op.OP, run)
