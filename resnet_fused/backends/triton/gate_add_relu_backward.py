"""`gate_add_relu_backward` in Triton: mask, store g, and sum per chunk of a sample; a second launch adds the chunks.

Bytes moved per element (16-bit): 4 read, 2 more with the forward's output, 2 written. The partial sums cost 8 bytes a
channel and chunk. Memory-bound; not measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import gate_add_relu_backward as op
from ...ops.contract import Tensor, channels_last_like
from .. import cards
from . import checks, chunk_sums, common
from .common import first_row, narrow, rows_in, widen

TILE, CAP, MIN_TILES = 1024, 64, 4


@triton.jit(do_not_specialize=["chunks", "UNITS", "TILES", "HW"])
def gate_add_relu_backward_kernel(
    grad_ptr, z_ptr, out_ptr,  # [N, HW, C] each, the last or None
    g_ptr,  # [N, HW, C]
    partial_ptr,  # [chunks, N, C]
    chunks, UNITS, TILES, HW,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = (tl.program_id(0) // column_tiles) % chunks
    sample = (tl.program_id(0) // column_tiles) // chunks
    samples = tl.num_programs(0) // (column_tiles * chunks)
    cols = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    begin = sample.to(tl.int64) * HW * C
    sum_gz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.range(0, TILES, loop_unroll_factor=2):
        row = first_row(chunk, TILES, i, BLOCK_M)
        inside = rows_in(row, HW, BLOCK_M)[:, None] & in_cols[None, :]
        at = begin + row * C + offsets
        g = widen(tl.load(grad_ptr + at, mask=inside, other=0.0))
        if out_ptr is not None:
            g = tl.where(widen(tl.load(out_ptr + at, mask=inside, other=0.0)) <= 0, 0.0, g)
        tl.store(g_ptr + at, narrow(g, g_ptr.dtype.element_ty), mask=inside)
        sum_gz = tl.fma(g, widen(tl.load(z_ptr + at, mask=inside, other=0.0)), sum_gz)
    where = partial_ptr + (chunk.to(tl.int64) * samples + sample) * C + cols
    tl.store(where, tl.sum(sum_gz, axis=0), mask=in_cols)


def run(grad_out: Tensor, z: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.gate_add_relu_backward`. Raises RuntimeError on arguments that do not fit."""
    name = "gate_add_relu_backward"
    checks.data(name, "grad_out", grad_out)
    checks.same(name, "z", z, "grad_out", grad_out)
    checks.same(name, "out", out, "grad_out", grad_out)
    n, c, h, w = grad_out.shape
    empty = grad_out.new_empty if grad_out.numel() else grad_out.new_zeros  # sums over nothing are zero
    g, sum_gz = channels_last_like(grad_out), empty((n, c), dtype=torch.float32)
    if grad_out.numel():
        width, div = common.block_c(c, CAP), min(c & -c, 16)
        row_tiles, column_tiles = common.cdiv(h * w, TILE // width), common.cdiv(c, width)
        programs = cards.of(grad_out.device).programs(common.REDUCTION_PROGRAMS)
        tiles = common.cdiv(row_tiles, max(1, min(programs // (n * column_tiles), row_tiles // MIN_TILES)))
        chunks = common.cdiv(row_tiles, tiles)
        partial = grad_out.new_empty((1, chunks, n * c), dtype=torch.float32)
        sizes = {"chunks": chunks, "UNITS": c // div, "TILES": tiles, "HW": h * w}
        sizes |= {"DIV": div, "BLOCK_M": TILE // width, "BLOCK_C": width}
        started = n * chunks * column_tiles
        common.start(gate_add_relu_backward_kernel, started, grad_out, z, out, g, partial, **sizes)
        chunk_sums.add(partial, [sum_gz])  # a vector of N*C numbers
    return g, sum_gz


KERNEL = common.register(op.OP, run)
