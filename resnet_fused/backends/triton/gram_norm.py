"""`gram_norm` in Triton: one launch. A program owns BLOCK_M rows of W; the covariance is made tile by tile from `gram`.

For each tile of columns j: ``acc = sum_i W[:, i] cov[i, j]``, then ``var += rowsum(acc * W[:, j])`` and
``mean += rowsum(W[:, j] * (m + centre)[j])``; the two sums are kept elementwise and reduced once. `cov` is never
written: its tile costs two operations an element beside BLOCK_M multiply-adds, and digits cancel in its elements only.

Every product is float32 times float32 on the ordinary units (`ieee`), also for 16-bit weights and where TF32 is allowed
for convolutions: batch norm divides by the deviation. Bytes: `gram` (4 C^2, in L2) once a program, W once and, out of
L1 or L2, C / BLOCK_N times more. At K = 2048, C = 512 that is 2 K C^2 = 1.1 GFLOP, 16 us at the 67 TFLOP/s on an H100's
data sheet, and 134 MB out of L2; BLOCK_M is as small as 16 so that K = 2048 still makes 128 programs. Not measured on
hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops import gram_norm as op
from ...ops.contract import Tensor
from . import checks, common, configs, gemm
from .bn_affine import outputs, store_statistics
from .common import clamp_below_zero, first_row, rows_in, widen


@triton.jit(do_not_specialize=["M", "K", "UNITS"])
def gram_norm_kernel(
    weight_ptr, gram_ptr, total_ptr, centre_ptr,  # [K, C], [C, C], [C], [C]
    mean_ptr, m2_ptr,  # [K], [K] or None
    gamma_ptr, beta_ptr, var_ptr, rstd_ptr, scale_ptr, shift_ptr, centre_out_ptr,  # without m2_ptr: see `store_affine`
    M, K, UNITS,
    EPS: tl.constexpr, DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    pitch = C.to(tl.int64)
    per_pixel = tl.div_rn(1.0, M.to(tl.float32))
    row = first_row(tl.program_id(0), 1, 0, BLOCK_M)
    in_rows = rows_in(row, K, BLOCK_M)
    offsets = tl.arange(0, BLOCK_M)[:, None] * C
    weight_ptr += row * C
    mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    var = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.range(0, C, BLOCK_N):
        cols = j + tl.arange(0, BLOCK_N)
        in_cols = cols < C
        m = tl.load(total_ptr + cols, mask=in_cols, other=0.0) * per_pixel
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.range(0, C, BLOCK_K):
            depth = i + tl.arange(0, BLOCK_K)
            in_depth = depth < C
            w = tl.load(weight_ptr + offsets + depth[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
            where = tl.arange(0, BLOCK_K)[:, None] * C + cols[None, :]
            gram = tl.load(gram_ptr + i * pitch + where, mask=in_depth[:, None] & in_cols[None, :], other=0.0)
            m_i = tl.load(total_ptr + depth, mask=in_depth, other=0.0) * per_pixel
            cov = tl.fma(-m_i[:, None], m[None, :], gram * per_pixel)
            acc = gemm.dot(widen(w), cov, acc, "ieee")
        w = widen(tl.load(weight_ptr + offsets + cols[None, :], mask=in_rows[:, None] & in_cols[None, :], other=0.0))
        centre = tl.load(centre_ptr + cols, mask=in_cols, other=0.0)
        var = tl.fma(acc, w, var)
        mean = tl.fma(w, (m + centre)[None, :], mean)
    rows = row + tl.arange(0, BLOCK_M)
    m2 = clamp_below_zero(tl.sum(var, axis=1)) * M.to(tl.float32)
    store_statistics(tl.sum(mean, axis=1), m2, M, rows, in_rows, mean_ptr, m2_ptr, gamma_ptr, beta_ptr,
                     var_ptr, rstd_ptr, scale_ptr, shift_ptr, centre_out_ptr, EPS)  # fmt: skip


def run(
    weight: Tensor,
    gram: Tensor,
    total: Tensor,
    centre: Tensor,
    a: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    """See :mod:`resnet_fused.ops.gram_norm`. Raises RuntimeError on arguments that do not fit."""
    name = "gram_norm"
    checks.gram_arguments(name, weight, gram, total, centre, a)
    k, c = weight.shape[:2]
    pixels = a.shape[0] * a.shape[2] * a.shape[3]
    found = outputs(name, total, k, gamma, beta, eps)
    if pixels == 0 or weight.numel() == 0:
        return found.of_nothing(a)
    units, div = gemm.split(c)
    config = configs.config(name, configs.capability(weight.device), weight.element_size(), c, c)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    sizes = {"M": pixels, "K": k, "UNITS": units, "DIV": div, "EPS": 0.0 if eps is None else eps}
    programs = common.cdiv(k, config.block_m)
    tensors = (weight, gram, total, centre, *found.arguments)
    gemm.launch(gram_norm_kernel, programs, config, *tensors, **sizes, **blocks)
    return found.results


KERNEL = common.register(op.OP, run)
