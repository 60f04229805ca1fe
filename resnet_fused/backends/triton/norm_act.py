"""`norm_act` in Triton: one program per tile column, one read of z, one write.

Bytes moved per element (16-bit): 2 read, 2 written. The vectors cost 8 bytes per channel and program, out of L2. An
exponential is one instruction of the special function unit, of which an SM has a quarter as many as lanes: bytes bind.
Not measured on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops import activation as codes
from ...ops import norm_act as op
from ...ops.contract import Tensor, channels_last_like
from . import activation, checks, common
from .common import first_row, narrow, rows_in, widen

TILE, CAP = 2048, 256


@triton.jit(do_not_specialize=["M", "UNITS", "TILES"])
def norm_act_kernel(
    z_ptr, scale_ptr, shift_ptr,  # [M, C], [C], [C]
    out_ptr,  # [M, C]
    M, UNITS, TILES, SLOPE,
    ACT: tl.constexpr, DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    cols = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
    shift = tl.load(shift_ptr + cols, mask=in_cols, other=0.0)[None, :]
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        inside = rows_in(row, M, BLOCK_M)[:, None] & in_cols[None, :]
        y = tl.fma(widen(tl.load(z_ptr + row * C + offsets, mask=inside, other=0.0)), scale, shift)
        out = narrow(activation.value(y, SLOPE, ACT), out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * C + offsets, out, mask=inside)


def check(name: str, z: Tensor, scale: Tensor, shift: Tensor, act: int) -> None:
    """Raise RuntimeError on wrong shapes, dtypes, devices, layouts; ValueError on a code that is none."""
    checks.vector(name, "scale", scale, z)
    checks.vector(name, "shift", shift, z)
    codes.check(act)


def run(z: Tensor, scale: Tensor, shift: Tensor, act: int, slope: float = 0.0) -> Tensor:
    """See :mod:`resnet_fused.ops.norm_act`. Raises as :func:`check`."""
    checks.data("norm_act", "z", z)
    check("norm_act", z, scale, shift, act)
    out = channels_last_like(z)
    if z.numel():
        plan = common.tiling(z, TILE, CAP, common.POINTWISE_PROGRAMS)
        common.launch(norm_act_kernel, plan, z, scale, shift, out, SLOPE=slope, ACT=act)
    return out


KERNEL = common.register(op.OP, run)
