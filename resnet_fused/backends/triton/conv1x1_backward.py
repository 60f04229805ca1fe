"""`conv1x1_backward` in Triton: one program per column tile and split of the rows; a second launch adds the splits.

Per tile of BLOCK_M rows a program applies ``dz`` on load, for all K channels at once, and uses it twice out of shared
memory: ``dz' x^`` goes to an accumulator that stays in registers to the end, ``dz W`` to the epilogue of
`conv1x1_dgrad`.

Bytes moved per row (16-bit): 2 K for g, 2 K for z where a term needs it, K/8 for its bits, 2 C for x, 2 C for each
pixel of the residual, 2 C written. Two kernels would read g, z, their bits and x twice: with K = 256 and C = 64 under a
Gram join 1472 bytes, here 800, and 384 for the correction that has to wait for grad_weight. Where C is wide, column
tiles of the same rows follow each other and read g, z and their bits again from L2. Partial sums as in `conv1x1_wgrad`.
Not measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import conv1x1_backward as op
from ...ops.contract import Tensor, channels_last_strides, nbytes
from .. import cards
from . import checks, common, configs, conv1x1_wgrad, data_gradient, gemm, limits, splits
from .common import first_row, load_factor, narrow, rows_in, widen, widen_pairs
from .data_gradient import add_product, check_additions, load_matrix, load_residual, residual_rows
from .gemm import apply_activation_in, dot, tile_of
from .lazy_tiles import load_row, load_tile, read_gradient, store_tile
from .split_sums import fold_rows

NAME = op.OP.name
BUSY = 0.64  # of the multiprocessors: 40 KB on its way to each is what the memory of most cards delivers in 1 us
FOLD = 8  # rows that a sum over rows keeps apart in registers


@triton.jit(do_not_specialize=["splits", "M", "UNITS_K", "UNITS_C", "TILES", "W", "HW"])
def conv1x1_backward_kernel(
    g_ptr, weight_ptr, x_ptr,  # [M, K], [K, C], [M, C]
    z_ptr, mask_ptr,  # [M, K] or None, [M, ceil(K / 8)] uint8 or None
    a_ptr, b_ptr, d_ptr, scale_ptr, shift_ptr,  # [K], each or None
    factor_ptr, weight_scale_ptr,  # [N], [K], each or None
    x_scale_ptr, x_shift_ptr, x_mean_ptr,  # [C], the first two together or None, the last with partial_ptr
    coupling_ptr, constant_ptr,  # [C, C] symmetric or None, [C] or None
    residual_ptr, residual_mask_ptr,  # [rows, C] and [rows, ceil(C / 8)] uint8, or None
    grad_ptr, grad_weight_ptr, sum_dz_ptr,  # [M, C], [splits, K, C], [splits, K]
    partial_ptr,  # [2, splits, C] or None: sums of grad_x and of grad_x * (x - x_mean)
    splits, M, UNITS_K, UNITS_C, TILES, W, HW,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,  # of the residual
    DIV_K: tl.constexpr, DIV_C: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
    FOLDED: tl.constexpr, PARTS: tl.constexpr,  # tiles of K: a program has them all
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    split, column_tile = tile_of(tl.program_id(0), tl.cdiv(UNITS_C * DIV_C, BLOCK_C))
    grad_weight, sum_dz = (), ()  # one of each for every part of K: Triton slices no registers
    for _ in tl.static_range(PARTS):
        grad_weight = grad_weight + (tl.zeros((BLOCK_K, BLOCK_C), tl.float32),)  # noqa: RUF005  nor does it unpack
        sum_dz = sum_dz + (tl.zeros((FOLDED, BLOCK_K), tl.float32),)  # noqa: RUF005
    if partial_ptr is not None:
        sum_g = tl.zeros((BLOCK_C,), tl.float32)
        sum_gx = tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.range(0, TILES):
        zero = i >> 30  # taken for a variable, see `conv1x1_dgrad_kernel`
        K = (UNITS_K + zero) * DIV_K
        C = (UNITS_C + zero) * DIV_C
        column = (column_tile + zero) * BLOCK_C
        row = first_row(split, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        factor = None
        if factor_ptr is not None:
            factor = load_factor(factor_ptr, row, in_rows, HW, BLOCK_M)
        x = load_tile(x_ptr, row, column, in_rows, C, BLOCK_M, BLOCK_C)
        x_scale = load_row(x_scale_ptr, column, C, BLOCK_C) if x_scale_ptr is not None else None
        x_shift = load_row(x_shift_ptr, column, C, BLOCK_C) if x_shift_ptr is not None else None
        activation = x
        if x_scale_ptr is not None:  # relu(shift) of a row that does not exist may be infinite, and times zero is NaN
            activation = apply_activation_in(in_rows, x, x_scale, x_shift, dtype)
        y = tl.zeros((BLOCK_C, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_C), tl.float32)
        added, sums = (), ()
        for part in tl.static_range(PARTS):
            k = part * BLOCK_K
            dz = read_gradient(g_ptr, z_ptr, mask_ptr, a_ptr, b_ptr, d_ptr, scale_ptr, shift_ptr, factor,
                               row, k, in_rows, K, BLOCK_M, BLOCK_K)  # fmt: skip
            added = added + (dot(tl.trans(dz), activation, grad_weight[part], PRECISION),)  # noqa: RUF005
            sums = sums + (sum_dz[part] + fold_rows(widen_pairs(dz), FOLDED, BLOCK_M, BLOCK_K),)  # noqa: RUF005
            if weight_scale_ptr is not None:
                dz = narrow(widen(dz) * load_row(weight_scale_ptr, k, K, BLOCK_K), dtype)
            weight = load_matrix(weight_ptr, k, column, K, C, BLOCK_K, BLOCK_C)
            y = add_product(y, dz, weight, PRECISION, TRANSPOSED)
        grad_weight, sum_dz = added, sums
        if coupling_ptr is not None:  # one column tile then
            coupling = load_matrix(coupling_ptr, 0, column, C, C, BLOCK_C, BLOCK_C)
            y = add_product(y, activation, coupling, PRECISION, TRANSPOSED)
        if TRANSPOSED:
            y = tl.trans(y)
        if constant_ptr is not None:
            y += load_row(constant_ptr, column, C, BLOCK_C)
        if partial_ptr is not None:
            y = tl.where(tl.fma(widen(x), x_scale, x_shift) <= 0, 0.0, y)
        if residual_ptr is not None:
            rows, has = residual_rows(row, W, HW, STRIDE_H, STRIDE_W, BLOCK_M)
            y += load_residual(residual_ptr, residual_mask_ptr, rows, has & in_rows, column, C, BLOCK_M, BLOCK_C)
        grad = narrow(y, dtype)
        store_tile(grad_ptr, grad, row, column, in_rows, C, BLOCK_M, BLOCK_C)
        if partial_ptr is not None:
            grad = tl.where(in_rows[:, None], widen(grad), 0.0)
            sum_g += tl.sum(grad, axis=0)
            sum_gx += tl.sum(grad * (widen(x) - load_row(x_mean_ptr, column, C, BLOCK_C)), axis=0)
    K = UNITS_K * DIV_K
    C = UNITS_C * DIV_C
    column = column_tile * BLOCK_C
    cols = column + tl.arange(0, BLOCK_C)
    for part in tl.static_range(PARTS):
        outs = part * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (outs < K)[:, None] & (cols < C)[None, :]
        where = grad_weight_ptr + split.to(tl.int64) * K * C
        tl.store(where + (outs[:, None] * C + cols[None, :]), grad_weight[part], mask=inside)
        if column == 0:
            tl.store(sum_dz_ptr + split.to(tl.int64) * K + outs, tl.sum(sum_dz[part], axis=0), mask=outs < K)
    if partial_ptr is not None:
        where = partial_ptr + split.to(tl.int64) * C + cols
        tl.store(where, sum_g, mask=cols < C)
        tl.store(where + splits.to(tl.int64) * C, sum_gx, mask=cols < C)


# Host side ------------------------------------------------------------------------------------------------------


def chosen(g: Tensor, c: int, sums: bool) -> tuple[configs.Config, bool]:
    """How to tile, and whether to compute the transpose of grad_x, see `conv1x1_dgrad.chosen`.

    Not with parts of K beyond 64, with which the transpose spilled.
    """
    arch, k = configs.capability(g.device), g.shape[1]
    config = configs.config(f"{NAME} sums" if sums else NAME, arch, g.element_size(), c, k)
    return config, arch // 10 in (9, 10) and config.block_n >= 64 and config.block_k <= 64


def start(g, weight, x, gradient, weight_scale, additions, residual, stride, results, sums) -> None:
    """Launch the product and what adds its splits up. `results`: grad_x, grad_weight, sum_dz; `sums`: or None."""
    (n, k, h, w), c = g.shape, x.shape[1]
    coupled = additions[3] is not None
    config, transposed = chosen(g, c, sums is not None)
    column_tiles, rows = common.cdiv(c, config.block_n), n * h * w
    assert not coupled or column_tiles == 1, "under a coupling a program needs all channels of x"
    moved = nbytes(g, *gradient[:2], x, residual[0], results[0])
    partial_bytes = 8 * (k * (c + 1) + (0 if sums is None else 2 * c))
    sizes = (rows, column_tiles, moved // rows, partial_bytes, config.block_m)
    split = splits.choose(*sizes, cards.of(g.device).sms, splits.resident(config), busy=BUSY)
    count = split.splits
    grad_x, *merged = results
    apart = count > 1 or merged[0].dtype != torch.float32  # one binary, whatever the number of splits
    partial = merged if not apart else [g.new_empty((count, *t.shape), dtype=torch.float32) for t in merged]
    partial_sums = None if sums is None else g.new_empty((2, count, c), dtype=torch.float32)
    (units_k, div_k), (units_c, div_c) = gemm.split(k), gemm.split(c)
    sizes = {"splits": count, "M": rows, "UNITS_K": units_k, "UNITS_C": units_c, "TILES": split.row_tiles, "W": w}
    sizes["HW"] = h * w
    sizes |= {"STRIDE_H": stride[0], "STRIDE_W": stride[1], "DIV_K": div_k, "DIV_C": div_c}
    sizes |= {"PRECISION": gemm.precision(g.dtype), "TRANSPOSED": transposed}
    sizes |= {"FOLDED": min(FOLD, config.block_m), "PARTS": common.cdiv(k, config.block_k)}
    sizes |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_C": config.block_n}
    arguments = (g, weight, x, *gradient, weight_scale, *additions, *residual, grad_x, *partial, partial_sums)
    gemm.launch(conv1x1_backward_kernel, count * column_tiles, config, *arguments, **sizes)
    if apart:
        conv1x1_wgrad.merge(tuple(partial), tuple(merged))
    if sums is not None:
        sums.merge(partial_sums)


def run(
    g: Tensor,
    weight: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    x_mean: Tensor | None = None,
    coupling: Tensor | None = None,
    constant: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mask: Tensor | None = None,
    residual_stride=(1, 1),
    x_rstd: Tensor | None = None,
    rounded: bool = False,
) -> tuple[Tensor, ...]:
    """See :mod:`resnet_fused.ops.conv1x1_backward`. Raises RuntimeError on arguments that do not fit."""
    checks.lazy_gradient(NAME, g, mask, z, a, b, d, scale, shift, sample_factor)
    gemm.check_weight(NAME, "weight", weight, g, g.shape[1], None)
    checks.vector(NAME, "weight_scale", weight_scale, g)
    (k, c), shape = weight.shape[:2], (g.shape[0], weight.shape[1], *g.shape[2:])
    grad_x = g.new_empty_strided(shape, channels_last_strides(shape))
    summed = x_mean is not None
    added = (residual, residual_mask, residual_stride)
    check_additions(NAME, grad_x, x, (1, 1), x_scale, x_shift, coupling, constant, *added, summed)
    checks.vector(NAME, "x_mean", x_mean, grad_x)
    if summed and x_scale is None:
        checks.fail(NAME, "got x_mean without x_scale; pass x_scale and x_shift too")
    for reason in limits.narrow_weight(k, c, coupling is not None):
        checks.fail(NAME, reason)
    vector = g.new_empty if grad_x.numel() else g.new_zeros  # sums over nothing are zero
    grad_weight = vector((k, c), dtype=weight.dtype if rounded else torch.float32)
    sum_dz = vector(k, dtype=torch.float32)
    sums = data_gradient.summed(NAME, grad_x, x, x_scale, x_mean, x_rstd, summed)
    if not (grad_x.numel() and k):
        return grad_x, grad_weight, sum_dz, *sums.of_nothing(x)
    if mask is not None:  # the bits decide
        scale = shift = None
    used_z = z if b is not None or scale is not None else None
    gradient = (used_z, mask, a, b, d, scale, shift, sample_factor)
    additions = (x_scale, x_shift, x_mean, coupling, constant)
    stride = (1, 1) if residual is None else residual_stride
    start(g, weight, x, gradient, weight_scale, additions, (residual, residual_mask), stride,
          (grad_x, grad_weight, sum_dz), sums if summed else None)  # fmt: skip
    return grad_x, grad_weight, sum_dz, *sums.results


KERNEL = common.register(op.OP, run)
