"""`bn_stats` in Triton: shifted sums per chunk of rows, merged by Chan's rule; two launches, no atomics.

Stage 1, one program per chunk and column tile: the shift is the mean of the chunk's first tile (T rows), then
``s = sum(z - shift)`` and ``q = sum((z - shift)^2)`` over the chunk's R rows. Cancellation is bounded for any data:
T rows with mean `shift` contribute T*(shift - mean)^2 or more to the chunk's own m2, so ``q <= (1 + R/T) * m2``.
Stage 2, one program per 8 channels: means are taken relative to the first chunk's shift, so a large common mean costs
no digits, then ``m2 = sum(m2_k + n_k * (mean_k - mean)^2)``.

Bytes moved per element of z (16-bit): 2 read; the first tile of a chunk is read again out of L1 or L2. The partial sums
cost 24 bytes per channel and chunk, at most 1024 chunks times tiles. Memory-bound; not measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import bn_stats as op
from ...ops.contract import Tensor, pitch
from . import checks, common
from .bn_affine import Outputs, outputs, store_statistics
from .common import first_row, rows_in, widen

TILE, CAP, MIN_TILES = 1024, 64, 4
MERGE_CHUNKS, MERGE_CHANNELS = 128, 8  # a tile of stage 2; 8 floats are one 32-byte sector


@triton.jit(do_not_specialize=["chunks", "UNITS_PITCH", "M", "UNITS", "TILES"])
def bn_stats_kernel(
    z_ptr, out_ptr,  # [M, C]; C channels of M pixels, to be filled with z, or None
    partial_ptr,  # [3, chunks, C]: shift, s, q
    chunks, UNITS_PITCH, M, UNITS, TILES,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    cols = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    row = first_row(chunk, TILES, 0, BLOCK_M)
    in_rows = rows_in(row, M, BLOCK_M)
    first = tl.load(z_ptr + row * C + offsets, mask=in_rows[:, None] & in_cols[None, :], other=0.0)
    shift = tl.sum(widen(first), axis=0) / tl.minimum(M - row, BLOCK_M).to(tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    q = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.range(0, TILES, loop_unroll_factor=2):
        row = first_row(chunk, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        read = tl.load(z_ptr + row * C + offsets, mask=in_rows[:, None] & in_cols[None, :], other=0.0)
        if out_ptr is not None:
            PITCH = UNITS_PITCH * DIV
            where = tl.arange(0, BLOCK_M)[:, None] * PITCH + cols[None, :]
            tl.store(out_ptr + row * PITCH + where, read, mask=in_rows[:, None] & in_cols[None, :])
        z = widen(read)
        centred = tl.where(in_rows[:, None], z - shift[None, :], 0.0)
        s += centred
        q = tl.fma(centred, centred, q)
    plane = chunks.to(tl.int64) * C
    where = chunk.to(tl.int64) * C + cols
    tl.store(partial_ptr + where, shift, mask=in_cols)
    tl.store(partial_ptr + plane + where, tl.sum(s, axis=0), mask=in_cols)
    tl.store(partial_ptr + 2 * plane + where, tl.sum(q, axis=0), mask=in_cols)


@triton.jit
def chunk_mean(partial_ptr, origin, k, cols, inside, chunks, M, C, chunk_rows, BLOCK_K: tl.constexpr):
    """Rows, mean relative to `origin`, and m2 of BLOCK_K chunks from `k` on; zeros beyond the last chunk."""
    index = k + tl.arange(0, BLOCK_K)
    plane = chunks.to(tl.int64) * C
    where = index.to(tl.int64)[:, None] * C + cols[None, :]
    shift = tl.load(partial_ptr + where, mask=inside, other=0.0)
    s = tl.load(partial_ptr + plane + where, mask=inside, other=0.0)
    q = tl.load(partial_ptr + 2 * plane + where, mask=inside, other=0.0)
    left = M - index.to(tl.int64) * chunk_rows
    n = tl.where(left < chunk_rows, left, chunk_rows).to(tl.float32)[:, None]
    mean = tl.where(inside, shift - origin[None, :] + s / n, 0.0)
    m2 = tl.where(inside, q - s * s / n, 0.0)
    return tl.where(inside, n, 0.0), mean, tl.where(m2 < 0, 0.0, m2)


@triton.jit(do_not_specialize=["chunks", "M", "C", "chunk_rows"])
def bn_stats_merge_kernel(
    partial_ptr,  # [3, chunks, C]
    mean_ptr, m2_ptr,  # [C], [C] or None
    gamma_ptr, beta_ptr, var_ptr, rstd_ptr, scale_ptr, shift_ptr, centre_ptr,  # without m2_ptr, see `store_affine`
    chunks, M, C, chunk_rows,
    EPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    origin = tl.load(partial_ptr + cols, mask=in_cols, other=0.0)
    weighted = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for k in tl.range(0, chunks, BLOCK_K):
        inside = (k + tl.arange(0, BLOCK_K) < chunks)[:, None] & in_cols[None, :]
        n, mean_k, m2_k = chunk_mean(partial_ptr, origin, k, cols, inside, chunks, M, C, chunk_rows, BLOCK_K)
        weighted = tl.fma(n, mean_k, weighted)
    mean = tl.sum(weighted, axis=0) / M.to(tl.float32)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for k in tl.range(0, chunks, BLOCK_K):
        inside = (k + tl.arange(0, BLOCK_K) < chunks)[:, None] & in_cols[None, :]
        n, mean_k, m2_k = chunk_mean(partial_ptr, origin, k, cols, inside, chunks, M, C, chunk_rows, BLOCK_K)
        away = mean_k - mean[None, :]
        total += tl.fma(n * away, away, m2_k)
    store_statistics(origin + mean, tl.sum(total, axis=0), M, cols, in_cols, mean_ptr, m2_ptr, gamma_ptr, beta_ptr,
                     var_ptr, rstd_ptr, scale_ptr, shift_ptr, centre_ptr, EPS)  # fmt: skip


def merge(partial: Tensor, rows: int, chunk_rows: int, outputs: Outputs, block: int, warps: int) -> None:
    """Start the second stage for chunks of `chunk_rows` of `rows` pixels, `block` of them at once."""
    _, chunks, c = partial.shape
    sizes = {"chunks": chunks, "M": rows, "C": c, "chunk_rows": chunk_rows}
    meta = {"EPS": 0.0 if outputs.eps is None else outputs.eps, "BLOCK_K": block, "BLOCK_C": MERGE_CHANNELS}
    programs = common.cdiv(c, MERGE_CHANNELS)
    common.start(bn_stats_merge_kernel, programs, partial, *outputs.arguments, **sizes, **meta, warps=warps)


def start(z: Tensor, out: Tensor | None, found: Outputs) -> None:
    """Launch both stages. `out`: a slice to be filled with `z` on the way, or None."""
    c = z.shape[1]
    plan = common.tiling(z, TILE, CAP, common.REDUCTION_PROGRAMS, MIN_TILES)
    beside = c if out is None else pitch(out)
    div = min(plan.meta["DIV"], beside & -beside)
    sizes = plan.meta | {"chunks": plan.chunks, "UNITS_PITCH": beside // div, "UNITS": c // div, "DIV": div}
    partial = z.new_empty((3, plan.chunks, c), dtype=torch.float32)
    common.start(bn_stats_kernel, plan.programs, z, out, partial, **sizes)
    merge(partial, sizes["M"], sizes["TILES"] * sizes["BLOCK_M"], found, MERGE_CHUNKS, common.NUM_WARPS)


def run(
    z: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, ...]:
    """See :mod:`resnet_fused.ops.bn_stats`. Raises RuntimeError on a wrong shape, dtype or layout."""
    checks.data("bn_stats", "z", z)
    c = z.shape[1]
    found = outputs("bn_stats", z, c, gamma, beta, eps)
    if z.numel() == 0:
        return found.of_nothing(z)
    start(z, None, found)
    return found.results


KERNEL = common.register(op.OP, run)
