"""The coefficients of a Gram join's gradients, one number a row of W each: what :mod:`.gram_grad` begins with.

The sums along a row: Wm, ``W centre`` and ``W * (P_d - sum_g m')``, which is grad_gamma without rstd: m is subtracted
where digits cancel, in the elements, not in their sums. Of them b, d0 and ``e = d0 - b*(W centre)``.

Where P comes in splits of the pixels (:mod:`.conv1x1_wgrad`), they are a launch, with a program for each few rows of W,
which adds the splits of its rows on the way, in order, and writes them down. Bytes: W, the splits of P, and P; mostly
within L2. At K = 2048, C = 512 that are 512 programs with 16 KB of each split. Not measured on hardware.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...ops.contract import Tensor
from . import common, configs, gemm
from .common import widen
from .split_sums import sum_splits

MERGE = {"ROWS": 4, "BLOCK_S": 4}  # rows of a program, and splits that it adds at once


@triton.jit
def row_sums(
    weight_ptr, product_ptr,  # at the program's first row
    total_ptr, centre_ptr, sum_g, per_pixel, in_rows, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``rowsum(W * (P - sum_g (centre + m)'))``, ``W m`` and ``W centre``."""
    offsets = tl.arange(0, BLOCK_M)[:, None] * C
    wp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wm = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.range(0, C, BLOCK_N):
        cols = j + tl.arange(0, BLOCK_N)
        in_cols = cols < C
        inside = in_rows[:, None] & in_cols[None, :]
        w = widen(tl.load(weight_ptr + offsets + cols[None, :], mask=inside, other=0.0))
        p = tl.load(product_ptr + offsets + cols[None, :], mask=inside, other=0.0)
        centre = tl.load(centre_ptr + cols, mask=in_cols, other=0.0)[None, :]
        m = (tl.load(total_ptr + cols, mask=in_cols, other=0.0) * per_pixel)[None, :]
        p = tl.fma(-sum_g[:, None], m, tl.fma(-sum_g[:, None], centre, p))
        wp = tl.fma(w, p, wp)
        wm = tl.fma(w, m, wm)
        wc = tl.fma(w, centre, wc)
    return tl.sum(wp, axis=1), tl.sum(wm, axis=1), tl.sum(wc, axis=1)


@triton.jit
def of_sums(wp, wm, wc, sum_g, scale_ptr, rstd_ptr, rows, per_pixel, in_rows):
    """grad_gamma, b, d0 and e of the rows `rows`, from their sums."""
    scale = tl.load(scale_ptr + rows, mask=in_rows, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
    grad_gamma = rstd * wp
    unit = scale * per_pixel
    b = -unit * (rstd * grad_gamma)
    d0 = unit * tl.fma(rstd * grad_gamma, wm, -sum_g)
    return grad_gamma, b, d0, tl.fma(-b, wc, d0)


@triton.jit
def coefficients(
    weight_ptr, product_ptr,  # at the first of BLOCK_M rows
    total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr, rows, per_pixel, in_rows, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the rows `rows`: grad_gamma, b, d0 and e."""
    sum_g = tl.load(sum_g_ptr + rows, mask=in_rows, other=0.0)
    wp, wm, wc = row_sums(weight_ptr, product_ptr, total_ptr, centre_ptr, sum_g, per_pixel, in_rows, C,
                          BLOCK_M, BLOCK_N)  # fmt: skip
    return of_sums(wp, wm, wc, sum_g, scale_ptr, rstd_ptr, rows, per_pixel, in_rows)


@triton.jit(do_not_specialize=["splits", "M", "K", "UNITS"])
def gram_grad_coefficients_kernel(
    weight_ptr,  # [K, C]
    partial_ptr, sum_partial_ptr,  # [splits, K, C], [splits, K]
    total_ptr, centre_ptr, scale_ptr, rstd_ptr,  # [C], [C], [K], [K]
    product_ptr, sum_g_ptr, grad_gamma_ptr, scratch_ptr,  # [K, C], [K], [K], [3, K]: b, e, d0
    splits, M, K, UNITS,
    DIV: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    per_pixel = tl.div_rn(1.0, M.to(tl.float32))
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    in_rows = rows < K
    sum_g = sum_splits(sum_partial_ptr, rows, in_rows, splits, K, BLOCK_S, ROWS)
    tl.store(sum_g_ptr + rows, sum_g, mask=in_rows)
    wp = tl.zeros((ROWS, BLOCK_N), tl.float32)
    wm = tl.zeros((ROWS, BLOCK_N), tl.float32)
    wc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    element = tl.arange(0, ROWS * BLOCK_N)
    offsets = tl.arange(0, ROWS)[:, None] * C
    weight_ptr += row.to(tl.int64) * C
    for j in tl.range(0, C, BLOCK_N):
        cols = j + tl.arange(0, BLOCK_N)
        in_cols = cols < C
        inside = in_rows[:, None] & in_cols[None, :]
        w = widen(tl.load(weight_ptr + offsets + cols[None, :], mask=inside, other=0.0))
        r, c = row + element // BLOCK_N, j + element % BLOCK_N
        there = (r < K) & (c < C)
        p = sum_splits(partial_ptr, r * C + c, there, splits, K * C, BLOCK_S, ROWS * BLOCK_N)
        tl.store(product_ptr + (r * C + c), p, mask=there)
        p = tl.reshape(p, (ROWS, BLOCK_N))
        centre = tl.load(centre_ptr + cols, mask=in_cols, other=0.0)[None, :]
        m = (tl.load(total_ptr + cols, mask=in_cols, other=0.0) * per_pixel)[None, :]
        p = tl.fma(-sum_g[:, None], m, tl.fma(-sum_g[:, None], centre, p))
        wp = tl.fma(w, p, wp)
        wm = tl.fma(w, m, wm)
        wc = tl.fma(w, centre, wc)
    grad_gamma, b, d0, e = of_sums(tl.sum(wp, axis=1), tl.sum(wm, axis=1), tl.sum(wc, axis=1), sum_g,
                                   scale_ptr, rstd_ptr, rows, per_pixel, in_rows)  # fmt: skip
    tl.store(grad_gamma_ptr + rows, grad_gamma, mask=in_rows)
    tl.store(scratch_ptr + rows, b, mask=in_rows)
    tl.store(scratch_ptr + K + rows, e, mask=in_rows)
    tl.store(scratch_ptr + 2 * K + rows, d0, mask=in_rows)


# Host side ------------------------------------------------------------------------------------------------------


class Join(NamedTuple):
    """What a Gram join has, beside its product and the sum of its gradient."""

    join_weight: Tensor  # [K, C, 1, 1]
    gram: Tensor  # [C, C]
    total: Tensor  # [C]
    centre: Tensor  # [C]
    join_scale: Tensor  # [K]
    join_rstd: Tensor  # [K]


def find(partial: tuple[Tensor, Tensor], join: Join, pixels: int, results: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Start the launch, which writes `results`, and return b, e and d0, ``[3, K]``.

    Args:
        partial: splits of the product, ``[splits, K, C]``, and of ``sum g``, ``[splits, K]``.
        results: room for the product, ``sum g`` and grad_gamma.
    """
    splits, k, c = partial[0].shape
    units, div = gemm.split(c)
    scratch = partial[0].new_empty(3, k)
    sizes = {"splits": splits, "M": pixels, "K": k, "UNITS": units, "DIV": div}
    sizes |= MERGE | {"BLOCK_N": configs.power_of_two(c, 32, 256)}
    given = (join.join_weight, *partial, join.total, join.centre, join.join_scale, join.join_rstd, *results, scratch)
    common.start(gram_grad_coefficients_kernel, common.cdiv(k, MERGE["ROWS"]), *given, **sizes)
    return scratch
