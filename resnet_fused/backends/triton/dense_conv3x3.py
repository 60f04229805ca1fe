"""`dense_conv3x3` in Triton: an implicit product of nine taps, of pixels that are normalised on load.

A program owns a column tile and `tiles` consecutive row tiles of pixels. For each it goes over taps and channels in one
loop, loads the tile's pixels moved by the tap, applies the norm, clamps, and clears those outside of the image: behind
the norm, whose shift is not zero. The sums of the rounded result are merged as in :mod:`.conv1x1`. No atomics.

Pixels by channels, unlike :mod:`.conv1x1`: tensor cores of sm_90 take 64 rows and more, and a layer makes 32 channels.

Bytes moved per pixel (16-bit): 2 K read, 2 G written. Through cuDNN it would be 6 K and 6 G: the norm written and read
again, and a pass that copies the result into the slice with its statistics. z is asked for nine times, of which a tile
of 128 pixels finds all but the first in L1, or, where images are wide, two in three there and the rest in L2. Partial
sums as in :mod:`.conv1x1`. Compiled and interpreted, not yet run on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import dense_conv3x3 as op
from ...ops.contract import Tensor
from .. import cards
from . import bn_affine, bn_stats, checks, common, conv1x1, gemm
from .common import first_row, narrow, rows_in, widen
from .dense_tiles import TAPS, check_slice, check_taps, load_tap, neighbours, store_slice, units
from .gemm import apply_activation, dot, tile_of
from .lazy_tiles import load_row, load_tile
from .norm_relu_pool import pixels_from

NAME = op.OP.name
_TAPS = tl.constexpr(TAPS)


@triton.jit(do_not_specialize=["chunks", "M", "UNITS_K", "UNITS_G", "UNITS_OUT", "TILES", "H", "W"])
def dense_conv3x3_kernel(
    z_ptr, weight_ptr, scale_ptr, shift_ptr,  # [M, K], [G, K, 3, 3], [K], [K]
    out_ptr, partial_ptr,  # G of the channels of M pixels; [3, chunks, G] or None: shift, s, q
    chunks, M, UNITS_K, UNITS_G, UNITS_OUT, TILES, H, W,
    DIV_K: tl.constexpr, DIV_G: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    K = UNITS_K * DIV_K
    G = UNITS_G * DIV_G
    chunk, column_tile = tile_of(tl.program_id(0), tl.cdiv(G, BLOCK_N))
    column = column_tile * BLOCK_N
    steps = tl.cdiv(K, BLOCK_K)
    if partial_ptr is not None:
        shift = tl.zeros((BLOCK_N,), tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        q = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        _sample, h, w = pixels_from(row, W, H * W, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, steps * _TAPS):
            tap = step // steps
            k = (step - tap * steps) * BLOCK_K
            down, right = tap // 3 - 1, tap % 3 - 1
            there = neighbours(h, w, in_rows, down, right, H, W)
            z = load_tile(z_ptr, row + (down * W + right), k, there, K, BLOCK_M, BLOCK_K)
            weight = load_tap(weight_ptr, tap, column, k, G, K, CHANNELS_LAST, BLOCK_N, BLOCK_K)
            z = apply_activation(z, load_row(scale_ptr, k, K, BLOCK_K), load_row(shift_ptr, k, K, BLOCK_K), dtype)
            acc = dot(tl.where(there[:, None], z, 0.0), tl.trans(weight), acc, PRECISION)
        out = narrow(acc, dtype)
        store_slice(out_ptr, out, row, column, in_rows, G, UNITS_OUT * DIV_G, BLOCK_M, BLOCK_N)
        if partial_ptr is not None:
            rounded = widen(out)
            if i == 0:
                shift = tl.sum(rounded, axis=0) / tl.minimum(M - row, BLOCK_M).to(tl.float32)
            centred = tl.where(in_rows[:, None], rounded - shift[None, :], 0.0)
            s += tl.sum(centred, axis=0)
            q += tl.sum(centred * centred, axis=0)
    if partial_ptr is not None:
        cols = column + tl.arange(0, BLOCK_N)
        plane = chunks.to(tl.int64) * G
        where = partial_ptr + chunk.to(tl.int64) * G + cols
        tl.store(where, shift, mask=cols < G)
        tl.store(where + plane, s, mask=cols < G)
        tl.store(where + 2 * plane, q, mask=cols < G)


def start(z: Tensor, weight: Tensor, affine: tuple, out: Tensor, channels_last: bool, found) -> None:
    """Launch the product and, for the statistics, the merge. `found`: where they go, or None."""
    (n, k, h, w), g = z.shape, out.shape[1]
    rows = n * h * w
    config = gemm.configuration(NAME, z, g, k)
    column_tiles, row_tiles = common.cdiv(g, config.block_n), common.cdiv(rows, config.block_m)
    sizes = (row_tiles, column_tiles, config, k, g, z.element_size(), cards.of(z.device))
    tiles = conv1x1.tiles_per_program(*sizes, wide=1)  # nine taps are enough to do
    chunks = common.cdiv(row_tiles, tiles)
    partial = z.new_empty((3, chunks, g), dtype=torch.float32) if found is not None else None
    (units_k, div_k), (div_g, (units_g, units_out)) = gemm.split(k), units(g, out)
    sizes = {"chunks": chunks, "M": rows, "UNITS_K": units_k, "UNITS_G": units_g, "UNITS_OUT": units_out}
    sizes |= {"TILES": tiles, "H": h, "W": w, "DIV_K": div_k, "DIV_G": div_g}
    sizes |= {"CHANNELS_LAST": channels_last, "PRECISION": gemm.precision(z.dtype)}
    sizes |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    programs = chunks * column_tiles
    gemm.launch(dense_conv3x3_kernel, programs, config, z, weight, *affine, out, partial, **sizes)
    if found is not None:
        block = conv1x1.MERGE_CHUNKS if chunks > bn_stats.MERGE_CHUNKS else bn_stats.MERGE_CHUNKS
        bn_stats.merge(partial, rows, tiles * config.block_m, found, block, block // 32)


def run(
    z: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out: Tensor, statistics: bool = True
) -> tuple[Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.dense_conv3x3`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    checks.data(NAME, "z", z)
    channels_last = check_taps(NAME, weight, z)
    checks.vector(NAME, "scale", scale, z)
    checks.vector(NAME, "shift", shift, z)
    check_slice(NAME, "out", out, z, weight.shape[0])
    found = bn_affine.outputs(NAME, z, out.shape[1] if statistics else 0, None, None, None)
    if out.numel() == 0 or z.numel() == 0:
        out.zero_()
        return found.of_nothing(z)[:2]
    start(z, weight, (scale, shift), out, channels_last, found if statistics else None)
    return found.results[:2]


KERNEL = common.register(op.OP, run)
