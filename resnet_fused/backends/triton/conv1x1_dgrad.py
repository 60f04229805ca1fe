"""`conv1x1_dgrad` in Triton: one product per tile of grad_x, from a lazy gradient; a second launch adds partial sums.
For the weight's gradient too, the product of `conv1x1_wgrad` comes first, and its splits are added in the launch of
this one, by programs of their own. They begin, while the splits are in L2.

A program owns BLOCK_N columns of grad_x and TILES consecutive tiles of BLOCK_M rows. Per tile it walks over K, ``dz``
applied on load and the weight as it lies, then, with a coupling, over C, ``x^`` applied on load, into one float32
accumulator. The epilogue masks by the recomputed sign and sums what it stores, or adds a residual.

Bytes moved per element (16-bit): 2 for g, 2 for z where a term needs it, 1/8 for its bits, 2 for x where it is used, at
its stride, 2 for each pixel of the residual, 2 written. Column tiles of the same rows follow each other and read g, z
and x again from L2, where K or C is wide; the matrices (2*K*C, 2*C*C) come out of L2 at every row tile. The partial
sums cost 16 bytes per channel and chunk: below 1% of the rest from 512 rows a program on, which it has where that
leaves enough programs. The ALU work on ``dz``, about ten instructions an element, is repeated by every column tile.
Not measured on hardware.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ...ops import conv1x1_dgrad as op
from ...ops.contract import Tensor, channels_last_strides
from .. import cards
from . import checks, common, configs, conv1x1_wgrad, data_gradient, gemm
from .common import first_row, load_factor, narrow, rows_in, widen
from .data_gradient import add_product, check_additions, load_matrix, load_residual, residual_rows
from .gemm import read_rows, tile_of
from .lazy_tiles import load_activation, load_pixels, load_row, read_gradient, store_tile
from .split_sums import ALONG, merge_tile

NAME = "conv1x1_dgrad"
CHUNKS = 1024  # at most so many partial sums per channel
SUM_ROWS = 512  # rows that a program with sums should have
SUM_PROGRAMS = 1024  # but not at the price of fewer programs than this


# Device side ----------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["chunks", "M", "UNITS_K", "UNITS_C", "TILES", "W", "HW", "X_H", "X_W", "splits", "merges"]
)
def conv1x1_dgrad_kernel(
    g_ptr, weight_ptr,  # [M, K], [K, C] or None: dz is the product
    z_ptr, mask_ptr,  # [M, K] or None, [M, ceil(K / 8)] uint8 or None
    a_ptr, b_ptr, d_ptr, scale_ptr, shift_ptr,  # [K], each or None
    factor_ptr,  # [N] or None
    x_ptr, x_scale_ptr, x_shift_ptr, x_mean_ptr,  # [N*X_H*X_W, C] or None, [C] each, all or None
    coupling_ptr, constant_ptr,  # [C, C] symmetric or None, [C] or None
    residual_ptr, residual_mask_ptr,  # [rows, C] and [rows, ceil(C / 8)] uint8, or None
    grad_ptr, partial_ptr,  # [M, C], [2, chunks, C] with x_scale: sums of grad_x and of grad_x * (x - x_mean)
    splits_ptr, grad_weight_ptr,  # [splits, K, C], [K, C], or None: to be added by the first `merges` programs
    chunks, M, UNITS_K, UNITS_C, TILES, W, HW, X_H, X_W, splits, merges,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,  # of the residual
    X_STRIDE_H: tl.constexpr, X_STRIDE_W: tl.constexpr,
    DIV_K: tl.constexpr, DIV_C: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    MERGE_S: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    program = tl.program_id(0)
    if splits_ptr is not None:
        if program < merges:
            size = (UNITS_K * DIV_K) * (UNITS_C * DIV_C)
            merge_tile(splits_ptr, grad_weight_ptr, program, splits, size, MERGE_S, MERGE)
            return
        program -= merges
    chunk, column_tile = tile_of(program, tl.cdiv(UNITS_C * DIV_C, BLOCK_N))
    if partial_ptr is not None:
        sum_g = tl.zeros((BLOCK_N,), tl.float32)
        sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(0, TILES):
        # A zero that the compiler takes for a variable: else it would compute the offsets of all tiles before the loop,
        # keep them in registers through the products below, and spill.
        zero = i >> 30
        K = (UNITS_K + zero) * DIV_K
        C = (UNITS_C + zero) * DIV_C
        column = (column_tile + zero) * BLOCK_N
        row = first_row(chunk, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        factor = None
        if factor_ptr is not None:
            factor = load_factor(factor_ptr, row, in_rows, HW, BLOCK_M)
        acc = tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N), tl.float32)
        if weight_ptr is not None:
            for k in tl.range(0, K, BLOCK_K):
                dz = read_gradient(g_ptr, z_ptr, mask_ptr, a_ptr, b_ptr, d_ptr, scale_ptr, shift_ptr, factor,
                                   row, k, in_rows, K, BLOCK_M, BLOCK_K, False)  # fmt: skip
                weight = load_matrix(weight_ptr, k, column, K, C, BLOCK_K, BLOCK_N)
                acc = add_product(acc, dz, weight, PRECISION, TRANSPOSED)
        x_rows = None
        if X_STRIDE_H != 1 or X_STRIDE_W != 1:
            x_rows = read_rows(row, W, HW, X_H, X_W, X_STRIDE_H, X_STRIDE_W, BLOCK_M)
        if coupling_ptr is not None:
            for k in tl.range(0, C, BLOCK_K):
                scale = load_row(x_scale_ptr, k, C, BLOCK_K) if x_scale_ptr is not None else None
                shift = load_row(x_shift_ptr, k, C, BLOCK_K) if x_shift_ptr is not None else None
                x = load_activation(x_ptr, scale, shift, row, x_rows, k, in_rows, C, BLOCK_M, BLOCK_K)
                coupling = load_matrix(coupling_ptr, k, column, C, C, BLOCK_K, BLOCK_N)
                acc = add_product(acc, x, coupling, PRECISION, TRANSPOSED)
        y = acc
        if TRANSPOSED:
            y = tl.trans(acc)
        if weight_ptr is None:
            dz = read_gradient(g_ptr, z_ptr, mask_ptr, a_ptr, b_ptr, d_ptr, scale_ptr, shift_ptr, factor,
                               row, column, in_rows, C, BLOCK_M, BLOCK_N)  # fmt: skip
            y += widen(dz)
        if constant_ptr is not None:
            y += load_row(constant_ptr, column, C, BLOCK_N)
        if x_scale_ptr is not None:
            x = widen(load_pixels(x_ptr, row, x_rows, column, in_rows, C, BLOCK_M, BLOCK_N))
            x_scale = load_row(x_scale_ptr, column, C, BLOCK_N)
            x_shift = load_row(x_shift_ptr, column, C, BLOCK_N)
            y = tl.where(tl.fma(x, x_scale, x_shift) <= 0, 0.0, y)
        if residual_ptr is not None:
            rows, has = residual_rows(row, W, HW, STRIDE_H, STRIDE_W, BLOCK_M)
            y += load_residual(residual_ptr, residual_mask_ptr, rows, has & in_rows, column, C, BLOCK_M, BLOCK_N)
        grad = narrow(y, dtype)
        store_tile(grad_ptr, grad, row, column, in_rows, C, BLOCK_M, BLOCK_N)
        if partial_ptr is not None:
            grad = tl.where(in_rows[:, None], widen(grad), 0.0)  # rows that do not exist hold relu(x_shift) coupling
            sum_g += tl.sum(grad, axis=0)
            sum_gx += tl.sum(grad * (x - load_row(x_mean_ptr, column, C, BLOCK_N)), axis=0)
    if partial_ptr is not None:
        cols = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        C = UNITS_C * DIV_C
        where = partial_ptr + chunk.to(tl.int64) * C + cols
        tl.store(where, sum_g, mask=cols < C)
        tl.store(where + chunks.to(tl.int64) * C, sum_gx, mask=cols < C)


# Host side ------------------------------------------------------------------------------------------------------


def chosen(device: torch.device, element_size: int, c: int, k: int, precision: str) -> tuple[configs.Config, bool]:
    """How to tile, and whether to compute the transpose: on tensor cores that read both operands from shared memory.

    A thread then holds few columns, and with them little of the vectors and sums of the epilogue; and dz, which goes to
    shared memory once, needs its vectors in the layout of the loads only. Those tensor cores take 64 rows and more.
    """
    arch = configs.capability(device)
    if element_size == 4 and precision == "ieee":
        return configs.config(NAME + " ieee", arch, element_size, c, k), False
    config = configs.config(NAME, arch, element_size, c, k)
    return config, arch // 10 in (9, 10) and config.block_n >= 64


def row_tiles(rows: int, block_m: int, column_tiles: int, sums: bool, card: cards.Card = cards.H100) -> tuple[int, int]:
    """Row tiles of a program, and how many programs then share a column: by shapes, not by the number of SMs."""
    tiles = common.cdiv(rows, block_m)
    if not sums:
        return 1, tiles
    chunks = max(common.cdiv(rows, SUM_ROWS), common.cdiv(card.programs(SUM_PROGRAMS), column_tiles))
    per_program = common.cdiv(tiles, min(tiles, card.programs(CHUNKS), chunks))
    return per_program, common.cdiv(tiles, per_program)


def start(grad_x, g, weight, gradient, additions, residual, strides, sums, splits=None, grad_weight=None) -> None:
    """Launch the product, and with `sums`, which it fills, the second stage. `strides`: of residual and x.

    Args:
        splits: of the weight's gradient, ``[splits, K, C]``, to be added on the way.
        grad_weight: written with their sum.
    """
    k, (n, c, h, w) = g.shape[1], grad_x.shape
    precision = gemm.precision(g.dtype)
    config, transposed = chosen(g.device, g.element_size(), c, k, precision)
    if weight is None:  # a tile of it is added where the accumulator and the epilogue's vectors take all registers
        config = dataclasses.replace(config, block_m=min(config.block_m, 64))
    column_tiles = common.cdiv(c, config.block_n)
    tiles, chunks = row_tiles(n * h * w, config.block_m, column_tiles, sums is not None, cards.of(g.device))
    partial = None if sums is None else g.new_empty((2, chunks, c), dtype=torch.float32)
    (units_k, div_k), (units_c, div_c) = gemm.split(k), gemm.split(c)
    sizes = {"chunks": chunks, "M": n * h * w, "UNITS_K": units_k, "UNITS_C": units_c, "TILES": tiles, "W": w}
    x_size, (stride, x_stride) = (h, w) if additions[0] is None else additions[0].shape[2:], strides
    sizes |= {"HW": h * w, "X_H": x_size[0], "X_W": x_size[1], "DIV_K": div_k, "DIV_C": div_c}
    sizes |= {"STRIDE_H": stride[0], "STRIDE_W": stride[1], "X_STRIDE_H": x_stride[0], "X_STRIDE_W": x_stride[1]}
    sizes |= {"PRECISION": precision, "TRANSPOSED": transposed}
    sizes |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    merges = 0 if splits is None else common.cdiv(k * c, ALONG["MERGE"])
    sizes |= {"splits": 0 if splits is None else len(splits), "merges": merges, **ALONG}
    arguments = (g, weight, *gradient, *additions, *residual, grad_x, partial, splits, grad_weight)
    gemm.launch(conv1x1_dgrad_kernel, merges + chunks * column_tiles, config, *arguments, **sizes)
    if sums is not None:
        sums.merge(partial)


def run(
    g: Tensor,
    weight: Tensor | None,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    x: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    x_mean: Tensor | None = None,
    coupling: Tensor | None = None,
    constant: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mask: Tensor | None = None,
    residual_stride=(1, 1),
    x_stride=(1, 1),
    x_rstd: Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[Tensor, ...]:
    """See :mod:`resnet_fused.ops.conv1x1_dgrad`. Raises RuntimeError on arguments that do not fit."""
    checks.lazy_gradient(NAME, g, mask, z, a, b, d, scale, shift, sample_factor)
    if weight is not None:
        gemm.check_weight(NAME, "weight", weight, g, g.shape[1], None)
    shape = (g.shape[0], g.shape[1] if weight is None else weight.shape[1], *g.shape[2:])
    grad_x = g.new_empty_strided(shape, channels_last_strides(shape))
    summed = x_scale is not None
    added = (residual, residual_mask, residual_stride)
    check_additions(NAME, grad_x, x, x_stride, x_scale, x_shift, coupling, constant, *added, summed)
    checks.pair(NAME, "x_scale", x_scale, "x_mean", x_mean, grad_x)
    sums = data_gradient.summed(NAME, grad_x, x, x_scale, x_mean, x_rstd, summed)
    if weight_grad and (weight is None or x is None):
        checks.fail(NAME, f"got weight_grad without {'weight' if weight is None else 'x'}; pass both")
    grad_weight = (g.new_empty if grad_x.numel() else g.new_zeros)(weight.shape[:2] if weight_grad else 0)
    if not grad_x.numel():
        return grad_x, *sums.of_nothing(x), grad_weight
    if mask is not None:  # the bits decide
        scale = shift = None
    used_z = z if b is not None or scale is not None else None
    used_x = x if summed or coupling is not None else None
    gradient = (used_z, mask, a, b, d, scale, shift, sample_factor)
    additions = (used_x, x_scale, x_shift, x_mean, coupling, constant)
    strides = (1, 1) if residual is None else residual_stride, (1, 1) if used_x is None else x_stride
    splits = None
    if weight_grad and g.numel():
        splits, _ = conv1x1_wgrad.start(g, x, gradient, x_scale, x_shift, x_stride)
    start(grad_x, g, weight, gradient, additions, (residual, residual_mask), strides, sums if summed else None,
          splits, None if splits is None else grad_weight)  # fmt: skip
    return grad_x, *sums.results, grad_weight


KERNEL = common.register(op.OP, run)
