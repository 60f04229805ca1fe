"""`norm_act_backward` in Triton: sums per chunk; a second launch adds the chunks. No atomics.

Bytes moved per element (16-bit): 4 read. The partial sums cost 8 bytes per sum, channel and chunk. Memory-bound; not
measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import norm_act_backward as op
from ...ops.contract import Tensor
from . import activation, checks, chunk_sums, common, norm_act
from .common import first_row, rows_in, widen

TILE, CAP, MIN_TILES = 1024, 64, 4


@triton.jit(do_not_specialize=["chunks", "M", "UNITS", "TILES"])
def norm_act_backward_kernel(
    grad_ptr, z_ptr,  # [M, C] each
    mean_ptr, scale_ptr, shift_ptr,  # [C] each
    partial_ptr,  # [2, chunks, C]: sum_g, sum_gz
    chunks, M, UNITS, TILES, SLOPE,
    ACT: tl.constexpr, DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    cols = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    mean = tl.load(mean_ptr + cols, mask=in_cols, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
    shift = tl.load(shift_ptr + cols, mask=in_cols, other=0.0)[None, :]
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_gz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        inside = rows_in(row, M, BLOCK_M)[:, None] & in_cols[None, :]
        g = widen(tl.load(grad_ptr + row * C + offsets, mask=inside, other=0.0))
        z = widen(tl.load(z_ptr + row * C + offsets, mask=inside, other=0.0))
        g = activation.gradient(g, tl.fma(z, scale, shift), SLOPE, ACT)
        sum_g += g
        sum_gz = tl.fma(g, z - mean, sum_gz)
    where = partial_ptr + chunk.to(tl.int64) * C + cols
    tl.store(where, tl.sum(sum_g, axis=0), mask=in_cols)
    tl.store(where + chunks.to(tl.int64) * C, tl.sum(sum_gz, axis=0), mask=in_cols)


def run(
    grad_out: Tensor, z: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, act: int, slope: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.norm_act_backward`. Raises as :func:`.norm_act.check`."""
    name = "norm_act_backward"
    checks.data(name, "grad_out", grad_out)
    checks.same(name, "z", z, "grad_out", grad_out)
    checks.vector(name, "mean", mean, z)
    norm_act.check(name, z, scale, shift, act)
    vector = z.new_empty if z.numel() else z.new_zeros  # sums over nothing are zero
    sums = vector(z.shape[1], dtype=torch.float32), vector(z.shape[1], dtype=torch.float32)
    if z.numel():
        plan = common.tiling(z, TILE, CAP, common.REDUCTION_PROGRAMS, MIN_TILES)
        partial = z.new_empty((2, plan.chunks, z.shape[1]), dtype=torch.float32)
        rest = (z, mean, scale, shift, partial, plan.chunks)
        common.launch(norm_act_backward_kernel, plan, grad_out, *rest, SLOPE=slope, ACT=act)
        chunk_sums.add(partial, list(sums))
    return sums


KERNEL = common.register(op.OP, run)
