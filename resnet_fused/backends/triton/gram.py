"""`gram` in Triton: one program per tile of the upper triangle and split of the rows; a second launch adds and mirrors.

A program walks over its rows, the contraction, in tiles of BLOCK_M: it loads the columns of both sides of its tile, the
same ones on the diagonal, makes ``d`` of them in registers, and adds ``d' d`` of d rounded to the dtype of a. The
programs on the diagonal also add up d before it is rounded. No atomics: each split stores partial sums of its own, and
the splits are added in order.

float32 is multiplied in full precision, whatever is allowed for convolutions: variances follow from the Gram matrix by
a difference, in which TF32's ten bits would be most of what is left. A split has at most `MOST_ROWS` rows, because
tensor cores are said to truncate their sums, and the diagonal is a sum of squares, where such errors all point one way.

Bytes moved per row (16-bit): 2 C from memory once, and ceil(C / BLOCK_C) times out of L2, since each program off the
diagonal reads two tiles and each one on it reads one. Partial sums cost 8 bytes per split and element of the triangle,
mostly within L2. A split's lie densely, its tiles on the diagonal as packed rows of their upper halves, so that every
32-byte sector is written and read whole. At 56 x 56 and batch 256 with C = 64 that is 2.0 MB for 119 splits, beside
102.8 MB of reads (0.03 ms of an H100's bandwidth); at batch 64, 2.3 MB for 132, beside 25.7 MB. Not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import gram as op
from ...ops import lazy
from ...ops.contract import Tensor
from .. import cards
from . import checks, common, configs, gemm, splits
from .common import first_row, narrow, rows_in, widen
from .gemm import dot, read_rows, tile_of
from .lazy_tiles import load_activation, load_row
from .split_sums import FOLD, MERGE, fold_rows, sum_splits

MOST_ROWS = 16384
MERGE_ROWS = 8  # of a merging tile; 8 floats are one 32-byte sector of the mirrored rows


@triton.jit
def pair_of(pair, tiles):
    """The tile pair ``i <= j`` of a number below tiles*(tiles + 1)/2: neighbours at growing distance, cyclically."""
    i = pair % tiles
    j = (i + pair // tiles) % tiles
    return tl.minimum(i, j), tl.maximum(i, j)


@triton.jit
def tile_start(pair, tiles, BLOCK_C: tl.constexpr):
    """Where a pair's tile begins among a split's partial sums: those on the diagonal come first, as upper halves."""
    LOWER: tl.constexpr = BLOCK_C * (BLOCK_C - 1) // 2
    return pair * (BLOCK_C * BLOCK_C) - tl.minimum(pair, tiles) * LOWER


@triton.jit
def load_shifted(
    a_ptr, centre, scale, shift, row, rows, column, in_rows, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A tile of d in float32, zero in rows and columns that do not exist."""
    x = load_activation(a_ptr, scale, shift, row, rows, column, in_rows, C, BLOCK_M, BLOCK_C)
    return tl.where(in_rows[:, None], widen(x) - centre, 0.0)


@triton.jit
def accumulate(
    a_ptr, centre_ptr, scale_ptr, shift_ptr, left, right, split, M, C, TILES,
    H, W, W_OUT, HW_OUT, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIAGONAL: tl.constexpr, FOLDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``d' d`` over a split's rows, for columns from `left` and `right` on, and on the diagonal folded sums of d."""
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    centre = load_row(centre_ptr, left, C, BLOCK_C)
    scale = load_row(scale_ptr, left, C, BLOCK_C) if scale_ptr is not None else None
    shift = load_row(shift_ptr, left, C, BLOCK_C) if shift_ptr is not None else None
    if not DIAGONAL:
        right_centre = load_row(centre_ptr, right, C, BLOCK_C)
        right_scale = load_row(scale_ptr, right, C, BLOCK_C) if scale_ptr is not None else None
        right_shift = load_row(shift_ptr, right, C, BLOCK_C) if shift_ptr is not None else None
    acc = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    total = tl.zeros((FOLDED, BLOCK_C), tl.float32)
    for i in tl.range(0, TILES):
        row = first_row(split, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        rows = None
        if STRIDE_H != 1 or STRIDE_W != 1:
            rows = read_rows(row, W_OUT, HW_OUT, H, W, STRIDE_H, STRIDE_W, BLOCK_M)
        d = load_shifted(a_ptr, centre, scale, shift, row, rows, left, in_rows, C, BLOCK_M, BLOCK_C)
        rounded = narrow(d, dtype)
        if DIAGONAL:
            total += fold_rows(d, FOLDED, BLOCK_M, BLOCK_C)
            acc = dot(tl.trans(rounded), rounded, acc, "ieee")
        else:
            other = load_shifted(a_ptr, right_centre, right_scale, right_shift,
                                 row, rows, right, in_rows, C, BLOCK_M, BLOCK_C)  # fmt: skip
            acc = dot(tl.trans(rounded), narrow(other, dtype), acc, "ieee")
    return acc, total


@triton.jit(do_not_specialize=["M", "UNITS", "TILES", "column_tiles", "pairs", "H", "W", "W_OUT", "HW_OUT"])
def gram_kernel(
    a_ptr, centre_ptr, scale_ptr, shift_ptr,  # [N*H*W, C], [C], [C] and [C], the last two together or None
    gram_ptr, total_ptr,  # [splits, tile_start(pairs)], [splits, C]
    M, UNITS, TILES, column_tiles, pairs,
    H, W, W_OUT, HW_OUT,  # the sizes of pixels matter only where a stride is not 1
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIV: tl.constexpr, FOLDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    split, pair = tile_of(tl.program_id(0), pairs)
    i, j = pair_of(pair, column_tiles)
    i, j = i * BLOCK_C, j * BLOCK_C
    r, c = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_C)[None, :]
    gram_ptr += split.to(tl.int64) * tile_start(pairs, column_tiles, BLOCK_C) + tile_start(pair, column_tiles, BLOCK_C)
    if i == j:
        acc, total = accumulate(a_ptr, centre_ptr, scale_ptr, shift_ptr, i, j, split, M, C, TILES,
                                H, W, W_OUT, HW_OUT, STRIDE_H, STRIDE_W, True, FOLDED, BLOCK_M, BLOCK_C)  # fmt: skip
        cols = i + tl.arange(0, BLOCK_C)
        tl.store(total_ptr + split.to(tl.int64) * C + cols, tl.sum(total, axis=0), mask=cols < C)
        # A zero that the compiler takes for a variable: else it would compute where rows begin before the loop.
        r += TILES >> 30
        tl.store(gram_ptr + (r * BLOCK_C + c - r * (r + 1) // 2), acc, mask=r <= c)
    else:
        acc, total = accumulate(a_ptr, centre_ptr, scale_ptr, shift_ptr, i, j, split, M, C, TILES,
                                H, W, W_OUT, HW_OUT, STRIDE_H, STRIDE_W, False, FOLDED, BLOCK_M, BLOCK_C)  # fmt: skip
        tl.store(gram_ptr + (r * BLOCK_C + c), acc)


@triton.jit(do_not_specialize=["splits", "C", "column_tiles", "pairs"])
def gram_merge_kernel(
    gram_partial_ptr, total_partial_ptr,  # [splits, tile_start(pairs)], [splits, C]
    gram_ptr, total_ptr,  # [C, C], [C]
    splits, C, column_tiles, pairs,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK // ROWS
    per_pair: tl.constexpr = BLOCK_C * BLOCK_C // BLOCK
    pair, piece = tile_of(tl.program_id(0), per_pair)
    element = tl.arange(0, BLOCK)
    if pair < pairs:
        i, j = pair_of(pair, column_tiles)
        piece_row, piece_col = tile_of(piece, BLOCK_C // WIDTH)
        r = piece_row * ROWS + element // WIDTH
        c = piece_col * WIDTH + element % WIDTH
        where = tile_start(pair, column_tiles, BLOCK_C) + r * BLOCK_C + c
        where -= tl.where(i == j, r * (r + 1) // 2, 0)
        rows, cols = (i * BLOCK_C + r).to(tl.int64), (j * BLOCK_C + c).to(tl.int64)
        there = (rows <= cols) & (cols < C)  # on the diagonal, the upper half stands for both
        plane = tile_start(pairs, column_tiles, BLOCK_C)
        merged = sum_splits(gram_partial_ptr, where, there, splits, plane, BLOCK_S, BLOCK)
        tl.store(gram_ptr + rows * C + cols, merged, mask=there)
        tl.store(gram_ptr + cols * C + rows, merged, mask=there)
    else:
        channels = ((pair - pairs) * per_pair + piece) * BLOCK + element
        exist = channels < C
        merged = sum_splits(total_partial_ptr, channels, exist, splits, C, BLOCK_S, BLOCK)
        tl.store(total_ptr + channels, merged, mask=exist)


def run(
    a: Tensor, centre: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, stride=(1, 1)
) -> tuple[Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.gram`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    name = op.OP.name
    checks.data(name, "a", a)
    checks.vector(name, "centre", centre, a)
    checks.pair(name, "scale", scale, "shift", shift, a)
    checks.stride(name, "stride", stride)
    n, c, h, w = lazy.strided_shape(a, a.shape[1], stride)
    if a.numel() == 0:
        return a.new_zeros((c, c), dtype=torch.float32), a.new_zeros(c, dtype=torch.float32)
    config = configs.config(name, configs.capability(a.device), a.element_size(), c, c)
    block, rows = config.block_n, n * h * w
    column_tiles = common.cdiv(c, block)
    pairs = column_tiles * (column_tiles + 1) // 2
    plane = pairs * block * block - column_tiles * block * (block - 1) // 2  # of `tile_start`
    sizes = (rows, pairs, c * a.element_size(), 8 * (plane + c), config.block_m)
    split = splits.choose(*sizes, cards.of(a.device).sms, splits.resident(config), MOST_ROWS)
    gram, total = (a.new_empty(shape, dtype=torch.float32) for shape in ((c, c), (c,)))
    partial = (gram.new_empty((split.splits, plane)), gram.new_empty((split.splits, c)))
    units, div = gemm.split(c)
    sizes = {"column_tiles": column_tiles, "pairs": pairs, "BLOCK_C": block}
    meta = {"M": rows, "UNITS": units, "TILES": split.row_tiles, "DIV": div, "BLOCK_M": config.block_m, "FOLDED": FOLD}
    geometry = {"H": a.shape[2], "W": a.shape[3], "W_OUT": w, "HW_OUT": h * w}
    geometry |= {"STRIDE_H": stride[0], "STRIDE_W": stride[1]}
    programs = split.splits * pairs
    gemm.launch(gram_kernel, programs, config, a, centre, scale, shift, *partial, **sizes, **meta, **geometry)
    meta = {"splits": split.splits, "C": c, "ROWS": MERGE_ROWS, **MERGE}
    programs = pairs * block * block // MERGE["BLOCK"] + common.cdiv(c, MERGE["BLOCK"])
    common.start(gram_merge_kernel, programs, partial[0], partial[1], gram, total, **sizes, **meta)
    return gram, total


KERNEL = common.register(op.OP, run)
