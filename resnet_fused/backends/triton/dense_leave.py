"""`dense_leave` in Triton: one program per tile column.

Bytes moved per element (16-bit): 2 each for the gradient and x, 2 written; the vectors cost 8 bytes per channel and
program, out of L2. Compiled and interpreted, not yet run on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops import dense_leave as op
from ...ops.contract import Tensor, channels_last_like
from . import checks, common
from .common import first_row, narrow, rows_in, widen
from .dense_tiles import affine_gradient, check_slice, load_slice, units
from .lazy_tiles import load_row, store_tile

NAME = op.OP.name
TILE, CAP = 2048, 256


@triton.jit(do_not_specialize=["UNITS_GRAD", "UNITS_X", "M", "UNITS", "TILES"])
def dense_leave_kernel(
    grad_ptr, x_ptr, b_ptr, d_ptr,  # C of the channels of M pixels, twice; [C], [C]
    out_ptr,  # [M, C]
    UNITS_GRAD, UNITS_X, M, UNITS, TILES,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    chunk = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    column = (tl.program_id(0) % tl.cdiv(C, BLOCK_C)) * BLOCK_C
    b = load_row(b_ptr, column, C, BLOCK_C)
    d = load_row(d_ptr, column, C, BLOCK_C)
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        grad = widen(load_slice(grad_ptr, row, column, in_rows, C, UNITS_GRAD * DIV, BLOCK_M, BLOCK_C))
        x = widen(load_slice(x_ptr, row, column, in_rows, C, UNITS_X * DIV, BLOCK_M, BLOCK_C))
        out = narrow(affine_gradient(grad, x, b, d), out_ptr.dtype.element_ty)
        store_tile(out_ptr, out, row, column, in_rows, C, BLOCK_M, BLOCK_C)


def run(grad: Tensor, x: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """See :mod:`resnet_fused.ops.dense_leave`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    check_slice(NAME, "grad", grad)
    check_slice(NAME, "x", x, grad)
    checks.vector(NAME, "b", b, grad)
    checks.vector(NAME, "d", d, grad)
    out = channels_last_like(grad)
    if out.numel():
        plan = common.tiling(grad, TILE, CAP, common.POINTWISE_PROGRAMS)
        div, (count, *pitches) = units(grad.shape[1], grad, x)
        sizes = plan.meta | {"UNITS_GRAD": pitches[0], "UNITS_X": pitches[1], "UNITS": count, "DIV": div}
        common.start(dense_leave_kernel, plan.programs, grad, x, b, d, out, **sizes)
    return out


KERNEL = common.register(op.OP, run)
