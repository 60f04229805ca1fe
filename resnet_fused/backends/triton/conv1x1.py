"""`conv1x1` in Triton: x is read once, z written once, and its statistics leave the registers that z was in.

A program owns a column tile and `tiles` consecutive row tiles. For each it runs a pipelined loop over C
(:func:`.gemm.multiply`), rounds the accumulator to z, stores it, and adds to two sums per channel of the rounded z, as
in :mod:`.bn_stats`: ``s = sum(z - shift)``, ``q = sum((z - shift)^2)``, shift being the mean of its first row tile. A
second launch merges the programs by Chan's rule. No atomics.

* The accumulator is z', channels by rows: a sum over rows stays within four lanes and a channel's sums take a register
  or two. Rows by channels, sm_90 needed 40 times the shuffles and spilled (with 128 x 128 and 8 warps).
* The loops over row tiles and over C are one (``flatten``), so the next tile's loads are under way during an epilogue.

Bytes moved per pixel (16-bit): 2C read, 2K written. x is read K/BLOCK_N times, but column tiles of the same rows run
side by side, so the others come from L2; W comes from L2, 2C*BLOCK_N bytes a tile. The partial sums are 12 bytes per
channel and program, written once and read twice (the second time from L2): 12*K / (2*(C + K) * 128 * tiles) of the
traffic. `tiles_per_program` keeps that below 1% unless the tensor is small: at C = K, 56 x 56 and a batch of 256,
tiles = 4 and 0.6%; at a batch of 64, tiles = 1 and 2.3%. Not measured on hardware.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...ops import conv1x1 as op
from ...ops import lazy
from ...ops.contract import Tensor, channels_last_strides, pitch
from .. import cards
from . import bn_affine, bn_stats, checks, common, gemm
from .common import first_row, narrow, rows_in, widen
from .configs import Config
from .gemm import multiply, tile_of

NAME = op.OP.name
PROGRAMS = 2048  # about eight waves of an H100; beyond, a program takes more row tiles
MIN_PROGRAMS = 1024  # never fewer for the sake of small partial sums
PARTIAL_SHARE = 100  # the partial sums are at most one part in so many of the traffic
WIDE = 64  # columns; a program of a narrower tile takes more row tiles, so that it has as much to do
MERGE_CHUNKS = 512  # of a tile of the merge, where there are many


@triton.jit(
    do_not_specialize=["chunks", "M", "UNITS_IN", "UNITS_PITCH", "UNITS_OUT", "TILES", "W_OUT", "HW_OUT", "H", "W"]
)
def conv1x1_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr,  # C of the channels of N*H*W pixels, [K, C], [C] and [C], both or None
    z_ptr, partial_ptr,  # [M, K], [3, chunks, K] or None: shift, s, q
    chunks, M, UNITS_IN, UNITS_PITCH, UNITS_OUT, TILES, W_OUT, HW_OUT, H, W,
    DIV_IN: tl.constexpr, DIV_OUT: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C = UNITS_IN * DIV_IN
    PITCH = UNITS_PITCH * DIV_IN
    K = UNITS_OUT * DIV_OUT
    tl.assume(C > 0)  # every row tile has a step: without it the loops cannot become one
    chunk, column_tile = tile_of(tl.program_id(0), tl.cdiv(K, BLOCK_N))
    column = column_tile * BLOCK_N
    cols = column + tl.arange(0, BLOCK_N)
    in_cols = cols < K
    weight_ptr += column.to(tl.int64) * C
    offsets = tl.arange(0, BLOCK_M)[None, :] * K + cols[:, None]
    if partial_ptr is not None:
        shift = tl.zeros((BLOCK_N,), tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        q = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(0, TILES, flatten=True):
        row = first_row(chunk, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        acc = multiply(x_ptr, row, in_rows, weight_ptr, in_cols, scale_ptr, shift_ptr, C, PITCH, W_OUT, HW_OUT, H, W,
                       STRIDE_H, STRIDE_W, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        z = narrow(acc, z_ptr.dtype.element_ty)
        tl.store(z_ptr + row * K + offsets, z, mask=in_cols[:, None] & in_rows[None, :])
        if partial_ptr is not None:
            # of z as rounded; a lazy x makes rows that do not exist relu(shift), not 0
            rounded = tl.where(in_rows[None, :], widen(z), 0.0)
            if i == 0:
                shift = tl.sum(rounded, axis=1) / tl.minimum(M - row, BLOCK_M).to(tl.float32)
            centred = tl.where(in_rows[None, :], rounded - shift[:, None], 0.0)
            s += tl.sum(centred, axis=1)
            q += tl.sum(centred * centred, axis=1)
    if partial_ptr is not None:
        plane = chunks.to(tl.int64) * K
        where = partial_ptr + chunk.to(tl.int64) * K + cols
        tl.store(where, shift, mask=in_cols)
        tl.store(where + plane, s, mask=in_cols)
        tl.store(where + 2 * plane, q, mask=in_cols)


def tiles_per_program(
    row_tiles: int,
    column_tiles: int,
    config: Config,
    c: int,
    k: int,
    size: int,
    card: cards.Card = cards.H100,
    wide: int = WIDE,
) -> int:
    """Row tiles of a program: a function of shapes alone, so that sums have the same bits in every run.

    Args:
        size: bytes of an element of x and z.
        card: the same for all but a self-check's.
        wide: columns of a tile that is enough for a program; of narrower ones it takes several.
    """
    total = row_tiles * column_tiles
    narrow = wide // min(wide, config.block_n)
    small_partials = common.cdiv(PARTIAL_SHARE * 12 * k, size * (c + k) * config.block_m)
    most, least = card.programs(PROGRAMS), card.programs(MIN_PROGRAMS)
    return max(narrow, common.cdiv(total, most), min(small_partials, total // least))


def check(x: Tensor, weight: Tensor, x_scale: Tensor | None, x_shift: Tensor | None, stride) -> None:
    """Raise RuntimeError on wrong shapes, dtypes, devices, layouts."""
    checks.data(NAME, "x", x)
    gemm.check_weight(NAME, "weight", weight, x, None, x.shape[1])
    checks.pair(NAME, "x_scale", x_scale, "x_shift", x_shift, x)
    checks.stride(NAME, "stride", stride)


def start(
    x: Tensor, weight: Tensor, affine: tuple, z: Tensor, stride=(1, 1), found: bn_affine.Outputs | None = None
) -> None:
    """Launch the product and, for the statistics, the merge. `x`: also some channels of a tensor, at a stride of 1."""
    (n, k, h, w), c = z.shape, x.shape[1]
    rows = n * h * w
    config = gemm.configuration(NAME, x, k, c)
    column_tiles, row_tiles = common.cdiv(k, config.block_n), common.cdiv(rows, config.block_m)
    tiles = tiles_per_program(row_tiles, column_tiles, config, c, k, x.element_size(), cards.of(x.device))
    chunks = common.cdiv(row_tiles, tiles)
    partial = x.new_empty((3, chunks, k), dtype=torch.float32) if found is not None else None
    beside = pitch(x)
    (_, div_in), (units_out, div_out) = gemm.split(math.gcd(c, beside)), gemm.split(k)
    sizes = (chunks, rows, c // div_in, beside // div_in, units_out, tiles, w, h * w, *x.shape[2:])
    meta = {"DIV_IN": div_in, "DIV_OUT": div_out, "STRIDE_H": stride[0], "STRIDE_W": stride[1]}
    meta |= {"PRECISION": gemm.precision(x.dtype)}
    meta |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    programs = chunks * column_tiles
    gemm.launch(conv1x1_kernel, programs, config, x, weight, *affine, z, partial, *sizes, **meta)
    if found is not None:  # few programs walk over many chunks: a tall tile keeps them short
        block = MERGE_CHUNKS if chunks > bn_stats.MERGE_CHUNKS else bn_stats.MERGE_CHUNKS
        bn_stats.merge(partial, rows, tiles * config.block_m, found, block, block // 32)


def run(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    stride=(1, 1),
    emit_stats: bool = True,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    """See :mod:`resnet_fused.ops.conv1x1`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    check(x, weight, x_scale, x_shift, stride)
    _, k, _, _ = shape = lazy.strided_shape(x, weight.shape[0], stride)
    z = x.new_empty_strided(shape, channels_last_strides(shape))
    found = bn_affine.outputs(NAME, x, k if emit_stats else 0, gamma, beta, eps)
    if z.numel() == 0 or x.shape[1] == 0:
        return z.zero_(), *found.of_nothing(z)
    start(x, weight, (x_scale, x_shift), z, stride, found if emit_stats else None)
    return z, *found.results


KERNEL = common.register(op.OP, run)
