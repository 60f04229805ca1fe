"""`gate_add_relu` in Triton: one program per tile column, one read of z and residual, one write.

Bytes moved per element (16-bit): 2 read, 2 more with a residual, 2 written. Factors are 4 bytes an element out of
the first-level cache, as most rows of a tile share them. Memory-bound; not measured on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops import gate_add_relu as op
from ...ops.contract import Tensor, channels_last_like
from . import checks, common
from .common import clamp_below_zero, first_row, narrow, rows_in, samples_of, widen

TILE, CAP = 2048, 256


@triton.jit(do_not_specialize=["M", "UNITS", "TILES", "HW"])
def gate_add_relu_kernel(
    z_ptr, factor_ptr, term_ptr, residual_ptr,  # [M, C], [N, C], [N, C] or None, [M, C] or None
    out_ptr,  # [M, C]
    M, UNITS, TILES, HW,
    DIV: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    cols = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        inside = rows_in(row, M, BLOCK_M)[:, None] & in_cols[None, :]
        by_sample = samples_of(row, HW, BLOCK_M)[:, None] * C + cols[None, :]
        y = widen(tl.load(z_ptr + row * C + offsets, mask=inside, other=0.0))
        factor = tl.load(factor_ptr + by_sample, mask=inside, other=0.0)
        if term_ptr is not None:
            y = tl.fma(y, factor, tl.load(term_ptr + by_sample, mask=inside, other=0.0))
        else:
            y = y * factor
        if residual_ptr is not None:
            y = y + widen(tl.load(residual_ptr + row * C + offsets, mask=inside, other=0.0))
        if RELU:
            y = clamp_below_zero(y)
        tl.store(out_ptr + row * C + offsets, narrow(y, out_ptr.dtype.element_ty), mask=inside)


def run(
    z: Tensor, factor: Tensor, term: Tensor | None = None, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """See :mod:`resnet_fused.ops.gate_add_relu`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    name = "gate_add_relu"
    checks.data(name, "z", z)
    checks.by_sample(name, "factor", factor, z)
    checks.by_sample(name, "term", term, z)
    checks.same(name, "residual", residual, "z", z)
    out = channels_last_like(z)
    if z.numel():
        plan = common.tiling(z, TILE, CAP, common.POINTWISE_PROGRAMS)
        hw = z.shape[2] * z.shape[3]
        common.launch(gate_add_relu_kernel, plan, z, factor, term, residual, out, HW=hw, RELU=relu)
    return out


KERNEL = common.register(op.OP, run)
