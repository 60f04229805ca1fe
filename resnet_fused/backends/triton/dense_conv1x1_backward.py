"""`dense_conv1x1_backward` in Triton: one program per column tile and split of the rows; a second launch adds splits.

As :mod:`.conv1x1_backward`: a program applies ``dz`` on load, for all K channels at once, and uses it twice. The
gradient of its columns of x is masked, summed, scaled and added to what has gathered there; it is written to memory
that other layers have gathered in, so the programs of no other launch may run meanwhile, and those of this one touch
tiles of their own.

Bytes moved per pixel (16-bit): 2 K each for g and z, 2 C for x, 2 C for what has gathered, 2 C written. Column tiles of
the same rows follow each other and read g and z again from L2. Partial sums of 8 K C bytes a split, mostly within L2.
Compiled and interpreted, not yet run on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import dense_conv1x1_backward as op
from ...ops.contract import Tensor, nbytes
from .. import cards
from . import checks, common, gemm, limits, splits
from .common import first_row, narrow, rows_in, widen
from .data_gradient import load_matrix
from .dense_tiles import affine_gradient, check_slice, load_slice, merge, store_slice, units
from .gemm import dot, tile_of
from .lazy_tiles import load_row, load_tile

NAME = op.OP.name


@triton.jit(do_not_specialize=["splits", "M", "UNITS_K", "UNITS_C", "UNITS_OUT", "UNITS_GRAD", "UNITS_X", "TILES"])
def dense_conv1x1_backward_kernel(
    g_ptr, z_ptr, a_ptr, b_ptr, d_ptr, weight_ptr,  # [M, K] twice, [K] three times, [K, C]
    x_ptr, scale_ptr, shift_ptr, mean_ptr,  # C of the channels of M pixels; [C] three times
    gathered_ptr, out_ptr,  # C of the channels of M pixels, maybe the same ones
    grad_weight_ptr, partial_ptr,  # [splits, K, C], [2, splits, C]: sums of h and of h * (x - mean)
    splits, M, UNITS_K, UNITS_C, UNITS_OUT, UNITS_GRAD, UNITS_X, TILES,
    DIV_K: tl.constexpr, DIV_C: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,  # tiles of K: all of them
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    split, column_tile = tile_of(tl.program_id(0), tl.cdiv(UNITS_C * DIV_C, BLOCK_C))
    grad_weight = ()  # of each part of K
    for _ in tl.static_range(PARTS):
        grad_weight = grad_weight + (tl.zeros((BLOCK_K, BLOCK_C), tl.float32),)  # noqa: RUF005
    sum_h = tl.zeros((BLOCK_C,), tl.float32)
    sum_hx = tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.range(0, TILES):
        zero = i >> 30  # taken for a variable, see `conv1x1_dgrad_kernel`
        K = (UNITS_K + zero) * DIV_K
        C = (UNITS_C + zero) * DIV_C
        column = (column_tile + zero) * BLOCK_C
        row = first_row(split, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        x = widen(load_slice(x_ptr, row, column, in_rows, C, UNITS_X * DIV_C, BLOCK_M, BLOCK_C))
        scale = load_row(scale_ptr, column, C, BLOCK_C)
        before = tl.fma(x, scale, load_row(shift_ptr, column, C, BLOCK_C))
        clamped = tl.where(before < 0, 0.0, before)  # of rows that do not exist relu(shift), maybe infinite
        activation = narrow(tl.where(in_rows[:, None], clamped, 0.0), dtype)
        h = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        added = ()
        for part in tl.static_range(PARTS):
            k = part * BLOCK_K
            g = widen(load_tile(g_ptr, row, k, in_rows, K, BLOCK_M, BLOCK_K)) * load_row(a_ptr, k, K, BLOCK_K)
            z = widen(load_tile(z_ptr, row, k, in_rows, K, BLOCK_M, BLOCK_K))
            dz = affine_gradient(g, z, load_row(b_ptr, k, K, BLOCK_K), load_row(d_ptr, k, K, BLOCK_K))
            dz = narrow(tl.where(in_rows[:, None], dz, 0.0), dtype)
            added = added + (dot(tl.trans(dz), activation, grad_weight[part], PRECISION),)  # noqa: RUF005
            h = dot(dz, load_matrix(weight_ptr, k, column, K, C, BLOCK_K, BLOCK_C), h, PRECISION)
        grad_weight = added
        h = tl.where((before <= 0) | (in_rows[:, None] == 0), 0.0, h)
        gathered = widen(load_slice(gathered_ptr, row, column, in_rows, C, UNITS_GRAD * DIV_C, BLOCK_M, BLOCK_C))
        out = narrow(tl.fma(h, scale, gathered), dtype)
        store_slice(out_ptr, out, row, column, in_rows, C, UNITS_OUT * DIV_C, BLOCK_M, BLOCK_C)
        sum_h += tl.sum(h, axis=0)
        sum_hx += tl.sum(h * (x - load_row(mean_ptr, column, C, BLOCK_C)), axis=0)
    K = UNITS_K * DIV_K
    C = UNITS_C * DIV_C
    cols = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    base = grad_weight_ptr + split.to(tl.int64) * K * C
    for part in tl.static_range(PARTS):
        outs = part * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (outs < K)[:, None] & (cols < C)[None, :]
        tl.store(base + (outs[:, None] * C + cols[None, :]), grad_weight[part], mask=inside)
    where = partial_ptr + split.to(tl.int64) * C + cols
    tl.store(where, sum_h, mask=cols < C)
    tl.store(where + splits.to(tl.int64) * C, sum_hx, mask=cols < C)


def check(out, grad, g, z, a, b, d, x, weight, scale, shift, mean) -> None:
    """Raise RuntimeError on arguments that do not fit."""
    check_slice(NAME, "out", out)
    checks.data(NAME, "g", g)
    check_slice(NAME, "g", g, out, g.shape[1])
    checks.same(NAME, "z", z, "g", g)
    check_slice(NAME, "x", x, out)
    if grad is not None:
        check_slice(NAME, "grad", grad, out)
    gemm.check_weight(NAME, "weight", weight, g, g.shape[1], x.shape[1])
    for reason in limits.middle(*weight.shape[:2]):
        checks.fail(NAME, reason)
    for name, vector in (("a", a), ("b", b), ("d", d)):
        checks.vector(NAME, name, vector, g)
    for name, vector in (("scale", scale), ("shift", shift), ("mean", mean)):
        checks.vector(NAME, name, vector, x)


def run(
    out: Tensor,
    grad: Tensor | None,
    g: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.dense_conv1x1_backward`. Raises RuntimeError on arguments that do not fit."""
    check(out, grad, g, z, a, b, d, x, weight, scale, shift, mean)
    (n, k, h, w), c = g.shape, x.shape[1]
    sums = tuple(x.new_empty(c, dtype=torch.float32) for _ in range(2))
    grad_weight = torch.empty_like(weight)
    if not (x.numel() and k):
        return *(t.zero_() for t in sums), grad_weight.zero_()
    gathered = out if grad is None else grad
    config = gemm.configuration(NAME, g, c, k)
    rows, column_tiles = n * h * w, common.cdiv(c, config.block_n)
    sizes = (rows, column_tiles, nbytes(g, z, x, gathered, out) // rows, 8 * (k + 2) * c, config.block_m)
    split = splits.choose(*sizes, cards.of(g.device).sms, splits.resident(config))
    weights = g.new_empty((split.splits, k, c), dtype=torch.float32)
    partial = g.new_empty((2, split.splits, c), dtype=torch.float32)
    (units_k, div_k), (div_c, (units_c, *pitches)) = gemm.split(k), units(c, out, gathered, x)
    sizes = {"splits": split.splits, "M": rows, "UNITS_K": units_k, "UNITS_C": units_c, "UNITS_OUT": pitches[0]}
    sizes |= {"UNITS_GRAD": pitches[1], "UNITS_X": pitches[2], "TILES": split.row_tiles}
    sizes |= {"DIV_K": div_k, "DIV_C": div_c, "PRECISION": gemm.precision(g.dtype)}
    sizes |= {"PARTS": common.cdiv(k, config.block_k)}
    sizes |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_C": config.block_n}
    arguments = (g, z, a, b, d, weight, x, scale, shift, mean, gathered, out, weights, partial)
    gemm.launch(dense_conv1x1_backward_kernel, split.splits * column_tiles, config, *arguments, **sizes)
    merge(weights, partial, (*sums, grad_weight))
    return *sums, grad_weight


KERNEL = common.register(op.OP, run)
