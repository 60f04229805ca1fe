"""`gram_grad` in Triton: two launches, no atomics; one where the input is narrow.

A program per BLOCK_M rows of W: grad_weight, tile by tile, with ``W gram`` beside it. And a program per tile of the
upper triangle of `coupling`, looping over all K; it writes the tile and its mirror image. The tiles of the diagonal,
one for each tile of columns, sum ``constant = sum_k e_k W[k, c]`` on the way.

Both need coefficients of each row (:mod:`.gram_coefficients`), the rows' programs of their own, the coupling's of all:

* they find them, where the input is narrow, so that W and P are small. At K = 512, C = 128 ten programs read 0.4 MB
  each out of L2;
* else the rows' find theirs and write them down, and the coupling's are a launch that follows;
* or all were found when the splits of P were added (`after`): both kinds of programs run side by side.

Every product is float32 times float32 on the ordinary units (`ieee`), as in :mod:`.gram_norm`. Bytes: the rows'
programs read W and P, twice where they find coefficients, the second time out of L1 or L2, and `gram` (4 C^2, in L2)
once each; the coupling's two columns of tiles of W, out of L2. At K = 2048, C = 512: 1.1 and 0.6 GFLOP in 128 and 136
programs. Not measured on hardware.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...ops import gram_grad as op
from ...ops.contract import Tensor
from . import checks, common, configs, gemm
from .common import first_row, narrow, rows_in, widen
from .gram_coefficients import Join, coefficients, find


@triton.jit
def write_rows(
    program, weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr,
    scratch_ptr, grad_weight_ptr, grad_gamma_ptr, M, K, C,
    FIND: tl.constexpr,  # the coefficients; else they are in scratch
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the weight's gradient, and of gamma's where the coefficients are found here."""
    pitch = C.to(tl.int64)
    row = first_row(program, 1, 0, BLOCK_M)
    in_rows = rows_in(row, K, BLOCK_M)
    rows = row + tl.arange(0, BLOCK_M)
    offsets = tl.arange(0, BLOCK_M)[:, None] * C
    weight_ptr += row * C
    product_ptr += row * C
    if FIND:
        per_pixel = tl.div_rn(1.0, M.to(tl.float32))
        grad_gamma, b, d0, e = coefficients(
            weight_ptr, product_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr, rows, per_pixel, in_rows,
            C, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        tl.store(grad_gamma_ptr + rows, grad_gamma, mask=in_rows)
        if scratch_ptr is not None:
            tl.store(scratch_ptr + rows, b, mask=in_rows)
            tl.store(scratch_ptr + K + rows, e, mask=in_rows)
    else:
        b = tl.load(scratch_ptr + rows, mask=in_rows, other=0.0)
        d0 = tl.load(scratch_ptr + 2 * K + rows, mask=in_rows, other=0.0)
    sum_g = tl.load(sum_g_ptr + rows, mask=in_rows, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=in_rows, other=0.0)
    for j in tl.range(0, C, BLOCK_N):
        cols = j + tl.arange(0, BLOCK_N)
        in_cols = cols < C
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.range(0, C, BLOCK_K):
            depth = i + tl.arange(0, BLOCK_K)
            in_depth = depth < C
            w = tl.load(weight_ptr + offsets + depth[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
            where = tl.arange(0, BLOCK_K)[:, None] * C + cols[None, :]
            gram = tl.load(gram_ptr + i * pitch + where, mask=in_depth[:, None] & in_cols[None, :], other=0.0)
            acc = gemm.dot(widen(w), gram, acc, "ieee")
        inside = in_rows[:, None] & in_cols[None, :]
        p = tl.load(product_ptr + offsets + cols[None, :], mask=inside, other=0.0)
        centre = tl.load(centre_ptr + cols, mask=in_cols, other=0.0)[None, :]
        total = tl.load(total_ptr + cols, mask=in_cols, other=0.0)[None, :]
        p = tl.fma(-sum_g[:, None], centre, p)
        grad = tl.fma(scale[:, None], p, tl.fma(b[:, None], acc, d0[:, None] * total))
        grad = narrow(grad, grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + row * C + offsets + cols[None, :], grad, mask=inside)


@triton.jit
def upper_tile(program, tiles):
    """Row and column of a tile of the upper triangle; two rows of it, p and one from its end, fill one of `width`."""
    width = tiles + 1 - tiles % 2
    p, q = program // width, program % width
    first = q < tiles - p
    row = tl.where(first, p, tiles - 1 + tiles % 2 - p)
    return row, row + tl.where(first, q, q - (tiles - p))


@triton.jit
def write_coupling(
    tile, weight_ptr, product_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr,
    scratch_ptr,  # or None: the coefficients are found again
    coupling_ptr, constant_ptr, M, K, C,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the upper triangle of the coupling and its mirror image, on the diagonal a piece of the constant."""
    pitch = C.to(tl.int64)
    left, right = upper_tile(tile, tl.cdiv(C, BLOCK_N))
    rows = left * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = right * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < C, cols < C
    offsets = tl.arange(0, BLOCK_K)[:, None] * C
    acc = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    constant = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        in_depth = depth < K
        start = weight_ptr + k * pitch
        w_left = tl.load(start + offsets + rows[None, :], mask=in_depth[:, None] & in_rows[None, :], other=0.0)
        w_right = tl.load(start + offsets + cols[None, :], mask=in_depth[:, None] & in_cols[None, :], other=0.0)
        if scratch_ptr is not None:
            b = tl.load(scratch_ptr + depth, mask=in_depth, other=0.0)
            e = tl.load(scratch_ptr + K + depth, mask=in_depth, other=0.0)
        else:
            per_pixel = tl.div_rn(1.0, M.to(tl.float32))
            _, b, _, e = coefficients(
                start, product_ptr + k * pitch, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr, depth, per_pixel,
                in_depth, C, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        constant = tl.fma(e[:, None], widen(w_right), constant)
        acc = gemm.dot(tl.trans(widen(w_left)), b[:, None] * widen(w_right), acc, "ieee")
    rounded = narrow(acc, coupling_ptr.dtype.element_ty)
    inside = in_rows[:, None] & in_cols[None, :]  # the diagonal's own lower half is rounded otherwise: left out
    upper, mirror = rows[:, None] <= cols[None, :], rows[:, None] < cols[None, :]
    tl.store(coupling_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :], rounded, mask=inside & upper)
    tl.store(coupling_ptr + cols.to(tl.int64)[None, :] * C + rows[:, None], rounded, mask=inside & mirror)
    if left == right:
        tl.store(constant_ptr + cols, tl.sum(constant, axis=0), mask=in_cols)


@triton.jit(do_not_specialize=["M", "K", "UNITS"])
def gram_grad_kernel(
    weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr,  # [K, C], [K, C], [C, C], [C], [C]
    sum_g_ptr, scale_ptr, rstd_ptr,  # [K] each
    scratch_ptr,  # [3, K]: b, e, d0; None: all programs find the coefficients that they need
    grad_weight_ptr, grad_gamma_ptr, coupling_ptr, constant_ptr,  # [K, C], [K] without scratch, [C, C], [C]
    M, K, UNITS,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SQUARE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row_programs = tl.cdiv(K, BLOCK_M)
    if program < row_programs:
        write_rows(program, weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr,
                   scratch_ptr, grad_weight_ptr, grad_gamma_ptr, M, K, UNITS * DIV, scratch_ptr is None,
                   BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        write_coupling(program - row_programs, weight_ptr, product_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr,
                       rstd_ptr, scratch_ptr, coupling_ptr, constant_ptr, M, K, UNITS * DIV,
                       SQUARE, DEPTH)  # fmt: skip


@triton.jit(do_not_specialize=["M", "K", "UNITS"])
def gram_grad_rows_kernel(
    weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr,  # [K, C], [K, C], [C, C], [C], [C]
    sum_g_ptr, scale_ptr, rstd_ptr,  # [K] each
    scratch_ptr, grad_weight_ptr, grad_gamma_ptr,  # [2, K]: b, e; [K, C], [K]
    M, K, UNITS,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    write_rows(tl.program_id(0), weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr,
               rstd_ptr, scratch_ptr, grad_weight_ptr, grad_gamma_ptr, M, K, UNITS * DIV, True,
               BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=["K", "UNITS"])
def gram_grad_coupling_kernel(
    weight_ptr, scratch_ptr,  # [K, C], [2, K]: b, e
    coupling_ptr, constant_ptr,  # [C, C], [C]
    K, UNITS,
    DIV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    write_coupling(tl.program_id(0), weight_ptr, None, None, None, None, None, None, scratch_ptr,
                   coupling_ptr, constant_ptr, None, K, UNITS * DIV, BLOCK_N, BLOCK_K)  # fmt: skip


# Host side ------------------------------------------------------------------------------------------------------


Results = tuple[Tensor, Tensor, Tensor, Tensor]


def results(weight: Tensor, zeros: bool) -> Results:
    """Room for the results, or, of no pixels, these themselves."""
    (k, c), new = weight.shape[:2], weight.new_zeros if zeros else weight.new_empty
    vectors = (new(size, dtype=torch.float32) for size in (k, c))
    return new(k, c), next(vectors), new(c, c, 1, 1), next(vectors)


def no_results(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the place of all but the first, where there is no Gram join."""
    return like.new_empty(0, dtype=torch.float32), like.new_empty(0), like.new_empty(0, dtype=torch.float32)


def after(partial: tuple[Tensor, Tensor], join: Join, pixels: int, sum_g: Tensor, results: Results) -> None:
    """Two launches: add the splits of the product ``[splits, K, C]`` and of ``sum g``, [splits, K], and the formula.

    `sum_g` and `results` are written.
    """
    product = partial[0].new_empty(join.join_weight.shape[:2])
    scratch = find(partial, join, pixels, (product, sum_g, results[1]))
    side_by_side((product, sum_g), join, pixels, scratch, results)


class Tiles(NamedTuple):
    """How the rows and the coupling are tiled."""

    rows: configs.Config
    square: configs.Config
    row_programs: int
    square_programs: int
    sizes: dict  # arguments that all kernels take


def tiles_of(weight: Tensor) -> Tiles:
    """Of the gradients of `weight`."""
    (k, c), card = weight.shape[:2], (configs.capability(weight.device), weight.element_size())
    rows, square = configs.config("gram_grad", *card, c, c), configs.config("gram_grad coupling", *card, c, k)
    units, div = gemm.split(c)
    across = common.cdiv(c, square.block_n)
    programs = common.cdiv(k, rows.block_m), across * (across + 1) // 2
    return Tiles(rows, square, *programs, {"K": k, "UNITS": units, "DIV": div})


def _blocks(config: configs.Config) -> dict:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def _given(sums: tuple[Tensor, Tensor], join: Join) -> tuple[Tensor, ...]:
    weight, gram, total, centre, scale, rstd = join
    return weight, sums[0], gram, total, centre, sums[1], scale, rstd


def side_by_side(sums, join: Join, pixels: int, scratch: Tensor | None, results: Results) -> None:
    """Launch the programs of the rows and of the coupling together. `sums`: the product and ``sum g``."""
    rows, square, row_programs, square_programs, sizes = tiles_of(join.join_weight)
    blocks = _blocks(rows) | {"SQUARE": square.block_n, "DEPTH": square.block_k}
    gemm.launch(gram_grad_kernel, row_programs + square_programs, rows, *_given(sums, join), scratch, *results,
                M=pixels, **sizes, **blocks)  # fmt: skip


def one_after_the_other(sums, join: Join, pixels: int, results: Results) -> None:
    """The same in two launches: the rows' coefficients are known then."""
    rows, square, row_programs, square_programs, sizes = tiles_of(join.join_weight)
    scratch = sums[1].new_empty(2, len(sums[1]))
    gemm.launch(gram_grad_rows_kernel, row_programs, rows, *_given(sums, join), scratch, *results[:2],
                M=pixels, **sizes, **_blocks(rows))  # fmt: skip
    blocks = {"BLOCK_N": square.block_n, "BLOCK_K": square.block_k}
    gemm.launch(gram_grad_coupling_kernel, square_programs, square, join.join_weight, scratch, *results[2:],
                **sizes, **blocks)  # fmt: skip


def check(weight, product, gram, total, centre, sum_g, scale, rstd, a) -> None:
    """Raise RuntimeError on wrong shapes, dtypes, devices or layouts."""
    name = "gram_grad"
    checks.gram_arguments(name, weight, gram, total, centre, a)
    k, c = weight.shape[:2]
    checks.statistics(name, "product", product, (k, c), weight)
    for vector_name, vector in (("sum_g", sum_g), ("scale", scale), ("rstd", rstd)):
        checks.statistics(name, vector_name, vector, (k,), weight)


def run(
    weight: Tensor,
    product: Tensor,
    gram: Tensor,
    total: Tensor,
    centre: Tensor,
    sum_g: Tensor,
    scale: Tensor,
    rstd: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.gram_grad`. Raises RuntimeError on arguments that do not fit."""
    check(weight, product, gram, total, centre, sum_g, scale, rstd, a)
    pixels = a.shape[0] * a.shape[2] * a.shape[3]
    nothing = pixels == 0 or weight.numel() == 0
    found, join = results(weight, nothing), Join(weight, gram, total, centre, scale, rstd)
    if nothing:
        return found
    if weight.shape[1] > op.NARROW:
        one_after_the_other((product, sum_g), join, pixels, found)
    else:
        side_by_side((product, sum_g), join, pixels, None, found)
    return found


KERNEL = common.register(op.OP, run)
