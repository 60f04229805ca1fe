"""`lazy_grad_apply` in Triton: one program per tile column, one read of g, z and residual, one write.

Bytes moved per element (16-bit): 2 read, 2 more where z is needed, 2 more with a residual, 1/8 with bits, 2 written.
The vectors cost 4 to 20 bytes per channel and program, out of L2. Memory-bound; not measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import lazy_grad_apply as op
from ...ops.contract import Tensor, channels_last_like
from . import checks, common
from .common import first_row, load_factor, narrow, rows_in, widen
from .norm_add_relu_backward import load_bits

TILE, CAP = 2048, 256


@triton.jit(do_not_specialize=["M", "UNITS", "TILES", "HW"])
def lazy_grad_apply_kernel(
    g_ptr, z_ptr,  # [M, C], [M, C] or None
    a_ptr, b_ptr, d_ptr,  # [C] or None, the last two together
    scale_ptr, shift_ptr,  # [C], both or None
    factor_ptr, residual_ptr, mask_ptr,  # [N], [M, C], [M, ceil(C / 8)] uint8, each or None
    dz_ptr,  # [M, C]
    M, UNITS, TILES, HW,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    column = (tl.program_id(0) % column_tiles) * BLOCK_C
    cols = column + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    if a_ptr is not None:
        a = tl.load(a_ptr + cols, mask=in_cols, other=0.0)[None, :]
    if b_ptr is not None:
        b = tl.load(b_ptr + cols, mask=in_cols, other=0.0)[None, :]
        d = tl.load(d_ptr + cols, mask=in_cols, other=0.0)[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
        shift = tl.load(shift_ptr + cols, mask=in_cols, other=0.0)[None, :]
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        inside = in_rows[:, None] & in_cols[None, :]
        dz = widen(tl.load(g_ptr + row * C + offsets, mask=inside, other=0.0))
        if z_ptr is not None:
            z = widen(tl.load(z_ptr + row * C + offsets, mask=inside, other=0.0))
        if scale_ptr is not None:
            dz = tl.where(tl.fma(z, scale, shift) <= 0, 0.0, dz)
        if mask_ptr is not None:
            dz = tl.where(load_bits(mask_ptr, row, column, in_rows, C, BLOCK_M, BLOCK_C), dz, 0.0)
        if factor_ptr is not None:
            dz = dz * load_factor(factor_ptr, row, in_rows, HW, BLOCK_M)
        if a_ptr is not None:
            dz = dz * a
        if b_ptr is not None:
            dz = dz + tl.fma(z, b, d)
        if residual_ptr is not None:
            dz = dz + widen(tl.load(residual_ptr + row * C + offsets, mask=inside, other=0.0))
        tl.store(dz_ptr + row * C + offsets, narrow(dz, dz_ptr.dtype.element_ty), mask=inside)


def run(
    g: Tensor,
    z: Tensor | None,
    a: Tensor | None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """See :mod:`resnet_fused.ops.lazy_grad_apply`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    name = "lazy_grad_apply"
    checks.data(name, "g", g)
    checks.same(name, "z", z, "g", g)
    checks.vector(name, "a", a, g)
    checks.pair(name, "b", b, "d", d, g)
    checks.pair(name, "scale", scale, "shift", shift, g)
    if z is None and (b is not None or scale is not None):
        checks.fail(name, f"got {'scale' if b is None else 'b'} without z; pass z too")
    checks.vector(name, "sample_factor", sample_factor, g, dim=0)
    checks.same(name, "residual", residual, "g", g)
    if mask is not None and mask.dtype != torch.uint8:
        checks.fail(name, f"mask is {mask.dtype}; pass packed bits, torch.uint8")
    checks.mask(name, mask, g)
    if mask is not None and scale is not None:
        checks.fail(name, "got a mask and scale and shift, which say the same; pass either")
    dz = channels_last_like(g)
    if g.numel():
        used_z = z if b is not None or scale is not None else None
        plan = common.tiling(g, TILE, CAP, common.POINTWISE_PROGRAMS)
        optional = (a, b, d, scale, shift, sample_factor, residual, mask)
        common.launch(lazy_grad_apply_kernel, plan, g, used_z, *optional, dz, HW=g.shape[2] * g.shape[3])
    return dz


KERNEL = common.register(op.OP, run)
