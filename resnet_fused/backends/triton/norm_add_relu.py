"""`norm_add_relu` in Triton: one program per tile column, one read of z and residual, one write.

Bytes moved per element of z (16-bit): 2 read, 2 more with a residual, 2 written, 1/8 with a mask. The vectors cost 8
to 16 bytes per channel and program, out of L2. An H100 (3.35 TB/s) would need 0.38 ms for a 256 x 256 x 56 x 56 tensor
with residual and mask, were it to reach its bandwidth; not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import norm_add_relu as op
from ...ops.contract import Tensor, channels_last_like, mask_shape
from . import checks, common
from .common import clamp_below_zero, first_row, load_factor, narrow, pack_bits, rows_in, widen

TILE, CAP = 2048, 256


@triton.jit(do_not_specialize=["M", "UNITS", "TILES", "HW"])
def norm_add_relu_kernel(
    z_ptr, scale_ptr, shift_ptr,  # [M, C], [C], [C]
    residual_ptr, residual_scale_ptr, residual_shift_ptr,  # [M, C], [C], [C], each or None
    factor_ptr,  # [N] or None
    out_ptr, mask_ptr,  # [M, C], [M, ceil(C / 8)] or None
    M, UNITS, TILES, HW,
    DIV: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    column = (tl.program_id(0) % column_tiles) * BLOCK_C
    cols = column + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
    shift = tl.load(shift_ptr + cols, mask=in_cols, other=0.0)[None, :]
    if residual_scale_ptr is not None:
        residual_scale = tl.load(residual_scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
        residual_shift = tl.load(residual_shift_ptr + cols, mask=in_cols, other=0.0)[None, :]
    rows = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * C + cols[None, :]
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        inside = in_rows[:, None] & in_cols[None, :]
        y = tl.fma(widen(tl.load(z_ptr + row * C + offsets, mask=inside, other=0.0)), scale, shift)
        if factor_ptr is not None:
            y = y * load_factor(factor_ptr, row, in_rows, HW, BLOCK_M)
        if residual_ptr is not None:
            residual = widen(tl.load(residual_ptr + row * C + offsets, mask=inside, other=0.0))
            if residual_scale_ptr is not None:
                residual = tl.fma(residual, residual_scale, residual_shift)
            y = y + residual
        if RELU:
            y = clamp_below_zero(y)
        out = narrow(y, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * C + offsets, out, mask=inside)
        if mask_ptr is not None:
            # of the rounded output, as stock sees it; padding columns must give zero bits
            keep = ((widen(out) <= 0) == 0) & in_cols[None, :]
            mask_width = tl.cdiv(C, 8)
            bytes_ = column // 8 + tl.arange(0, BLOCK_C // 8)
            there = in_rows[:, None] & (bytes_ < mask_width)[None, :]
            where = row * mask_width + rows[:, None] * mask_width + bytes_[None, :]
            tl.store(mask_ptr + where, pack_bits(keep, BLOCK_M, BLOCK_C), mask=there)


def run(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    relu: bool = True,
    emit_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.norm_add_relu`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    name = "norm_add_relu"
    checks.data(name, "z", z)
    checks.pair(name, "scale", scale, "shift", shift, z)
    checks.same(name, "residual", residual, "z", z)
    if residual_scale is not None and residual is None:
        checks.fail(name, "got residual_scale without residual; pass both")
    checks.pair(name, "residual_scale", residual_scale, "residual_shift", residual_shift, z)
    checks.vector(name, "sample_factor", sample_factor, z, dim=0)
    out = channels_last_like(z)
    mask = z.new_empty(mask_shape(z) if emit_mask else (0,), dtype=torch.uint8)
    if z.numel():
        plan = common.tiling(z, TILE, CAP, common.POINTWISE_PROGRAMS)
        optional = (residual, residual_scale, residual_shift, sample_factor)
        results = (out, mask if emit_mask else None)
        hw = z.shape[2] * z.shape[3]
        common.launch(norm_add_relu_kernel, plan, z, scale, shift, *optional, *results, HW=hw, RELU=relu)
    return out, mask


KERNEL = common.register(op.OP, run)
