"""`norm_add_relu_backward` in Triton: mask, store g, and sum per chunk; a second launch adds the chunks. No atomics.

Bytes moved per element (16-bit): 2 read for grad_out, 2 for each of z and residual, 1/8 for a packed mask or 2 for the
forward's output, 2 written where g is emitted. The partial sums cost 8 bytes per sum, channel and chunk. Memory-bound;
not measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import norm_add_relu_backward as op
from ...ops.contract import Tensor, channels_last_like
from . import checks, chunk_sums, common
from .common import first_row, load_factor, narrow, rows_in, unpack_bits, widen

TILE, CAP, MIN_TILES = 1024, 64, 4


@triton.jit
def load_bits(mask_ptr, row, column, in_rows, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of the packed mask, unpacked."""
    width = tl.cdiv(C, 8)
    bytes_ = column // 8 + tl.arange(0, BLOCK_C // 8)
    where = row * width + tl.arange(0, BLOCK_M)[:, None] * width + bytes_[None, :]
    there = in_rows[:, None] & (bytes_ < width)[None, :]
    return unpack_bits(tl.load(mask_ptr + where, mask=there, other=0), BLOCK_M, BLOCK_C)


@triton.jit(do_not_specialize=["chunks", "M", "UNITS", "TILES", "HW"])
def norm_add_relu_backward_kernel(
    grad_ptr, z_ptr,  # [M, C], [M, C] or None
    mean_ptr,  # [C] with z
    scale_ptr, shift_ptr,  # [C], both or None
    mask_ptr,  # BITS: [M, ceil(C / 8)] uint8; else the output [M, C], or None
    residual_ptr, residual_mean_ptr, factor_ptr,  # [M, C] and [C], or None; [N] or None
    g_ptr,  # [M, C] or None
    partial_ptr,  # [sums, chunks, C]: sum_g, sum_gz if z, residual_sum_g and residual_sum_gz if residual
    chunks, M, UNITS, TILES, HW,
    RELU: tl.constexpr, BITS: tl.constexpr,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    column = (tl.program_id(0) % column_tiles) * BLOCK_C
    cols = column + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
        shift = tl.load(shift_ptr + cols, mask=in_cols, other=0.0)[None, :]
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if z_ptr is not None:
        mean = tl.load(mean_ptr + cols, mask=in_cols, other=0.0)[None, :]
        sum_gz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if residual_ptr is not None:
        residual_mean = tl.load(residual_mean_ptr + cols, mask=in_cols, other=0.0)[None, :]
        residual_sum_gz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if factor_ptr is not None:
            residual_sum_g = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.range(0, TILES, loop_unroll_factor=2):
        row = first_row(chunk, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        inside = in_rows[:, None] & in_cols[None, :]
        g = widen(tl.load(grad_ptr + row * C + offsets, mask=inside, other=0.0))
        if z_ptr is not None:
            z = widen(tl.load(z_ptr + row * C + offsets, mask=inside, other=0.0))
        if BITS:
            g = tl.where(load_bits(mask_ptr, row, column, in_rows, C, BLOCK_M, BLOCK_C), g, 0.0)
        elif mask_ptr is not None:
            g = tl.where(widen(tl.load(mask_ptr + row * C + offsets, mask=inside, other=0.0)) <= 0, 0.0, g)
        elif RELU:
            g = tl.where(tl.fma(z, scale, shift) <= 0, 0.0, g)
        if g_ptr is not None:
            tl.store(g_ptr + row * C + offsets, narrow(g, g_ptr.dtype.element_ty), mask=inside)
        factored = g
        if factor_ptr is not None:
            factored = g * load_factor(factor_ptr, row, in_rows, HW, BLOCK_M)
        sum_g += factored
        if z_ptr is not None:
            sum_gz = tl.fma(factored, z - mean, sum_gz)
        if residual_ptr is not None:
            residual = widen(tl.load(residual_ptr + row * C + offsets, mask=inside, other=0.0))
            residual_sum_gz = tl.fma(g, residual - residual_mean, residual_sum_gz)
            if factor_ptr is not None:
                residual_sum_g += g
    where = partial_ptr + chunk.to(tl.int64) * C + cols
    plane = chunks.to(tl.int64) * C
    total = tl.sum(sum_g, axis=0)
    tl.store(where, total, mask=in_cols)
    if z_ptr is not None:
        where += plane
        tl.store(where, tl.sum(sum_gz, axis=0), mask=in_cols)
    if residual_ptr is not None:
        if factor_ptr is not None:
            total = tl.sum(residual_sum_g, axis=0)
        tl.store(where + plane, total, mask=in_cols)
        tl.store(where + 2 * plane, tl.sum(residual_sum_gz, axis=0), mask=in_cols)


def check(name, grad_out, z, mean, scale, shift, mask, residual, residual_mean, sample_factor, relu) -> None:
    """Raise RuntimeError on wrong shapes, dtypes, devices, layouts, or too few arguments."""
    checks.data(name, "grad_out", grad_out)
    checks.centred(name, "z", z, "mean", mean, grad_out)
    checks.pair(name, "scale", scale, "shift", shift, grad_out)
    checks.mask(name, mask, grad_out)
    if relu and mask is None and (z is None or scale is None):
        checks.fail(name, "with relu, pass mask, or z, scale and shift to recompute it from")
    checks.centred(name, "residual", residual, "residual_mean", residual_mean, grad_out)
    checks.vector(name, "sample_factor", sample_factor, grad_out, dim=0)


def start(
    grad_out, z, mean, scale, shift, mask, residual, residual_mean, sample_factor, relu, g, sums: int
) -> Tensor:  # fmt: skip
    """Launch the first stage; returns the chunks ``[sums, chunks, C]`` of so many sums. `g`: to be written, or None."""
    mask = mask if relu else None
    vectors = (scale, shift) if relu and mask is None else (None, None)
    plan = common.tiling(grad_out, TILE, CAP, common.REDUCTION_PROGRAMS, MIN_TILES)
    partial = grad_out.new_empty((sums, plan.chunks, grad_out.shape[1]), dtype=torch.float32)
    rest = (mask, residual, residual_mean, sample_factor, g, partial, plan.chunks)
    bits = mask is not None and mask.dtype == torch.uint8
    hw = grad_out.shape[2] * grad_out.shape[3]
    kernel = norm_add_relu_backward_kernel
    common.launch(kernel, plan, grad_out, z, mean, *vectors, *rest, HW=hw, RELU=relu, BITS=bits)
    return partial


def run(
    grad_out: Tensor,
    z: Tensor | None = None,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mean: Tensor | None = None,
    sample_factor: Tensor | None = None,
    relu: bool = True,
    emit_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.norm_add_relu_backward`. Raises RuntimeError on arguments that do not fit."""
    arguments = (grad_out, z, mean, scale, shift, mask, residual, residual_mean, sample_factor, relu)
    check("norm_add_relu_backward", *arguments)
    c = grad_out.shape[1]
    present = (True, z is not None, residual is not None, residual is not None)
    vector = grad_out.new_empty if grad_out.numel() else grad_out.new_zeros  # sums over nothing are zero
    sums = [vector(c if p else 0, dtype=torch.float32) for p in present]
    g = channels_last_like(grad_out) if emit_grad else grad_out.new_empty(0)
    if grad_out.numel():
        partial = start(*arguments, g if emit_grad else None, sum(present))
        chunk_sums.add(partial, [s for s, p in zip(sums, present, strict=True) if p])
    return g, *sums


KERNEL = common.register(op.OP, run)
