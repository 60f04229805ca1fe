"""`norm_relu_avg_pool` in Triton: a program per tile of output pixels and channels, which loads its windows directly.

Bytes moved per element of x (16-bit, 2x2 windows of stride 2): 2 read and 1/2 written; windows that overlap load pixels
again, from L1 or L2. Memory-bound; not measured on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops import norm_relu_avg_pool as op
from ...ops.contract import Tensor
from . import checks, common
from .common import clamp_below_zero, first_row, narrow, rows_in, widen
from .norm_relu_pool import UNROLL, pixels_from

TILE_BYTES, CAP = 2048, 64  # of averages: 16 bytes a thread


@triton.jit
def add_row(total, x_ptr, offsets, scale, shift, inside, r, C, W, KERNEL_W: tl.constexpr):
    """Add row `r` of the windows, whose first pixels are at `offsets`."""
    for s in tl.static_range(KERNEL_W):
        x = widen(tl.load(x_ptr + (r * W + s).to(tl.int64) * C + offsets, mask=inside, other=0.0))
        total += clamp_below_zero(tl.fma(x, scale, shift))
    return total


@triton.jit(do_not_specialize=["M", "UNITS", "TILES", "H", "W", "W_OUT", "HW_OUT"])
def norm_relu_avg_pool_kernel(
    x_ptr, scale_ptr, shift_ptr,  # [N * H * W, C], [C], [C]
    out_ptr,  # [M, C]
    M, UNITS, TILES, H, W, W_OUT, HW_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    UNROLLED: tl.constexpr, DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    cols = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
    shift = tl.load(shift_ptr + cols, mask=in_cols, other=0.0)[None, :]
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        inside = rows_in(row, M, BLOCK_M)[:, None] & in_cols[None, :]
        sample, h, w = pixels_from(row, W_OUT, HW_OUT, BLOCK_M)
        offsets = ((sample * H + h * STRIDE_H) * W + w * STRIDE_W)[:, None] * C + cols[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if UNROLLED:
            for r in tl.static_range(KERNEL_H):
                total = add_row(total, x_ptr, offsets, scale, shift, inside, r, C, W, KERNEL_W)
        else:
            for r in tl.range(0, KERNEL_H):
                total = add_row(total, x_ptr, offsets, scale, shift, inside, r, C, W, KERNEL_W)
        there = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
        average = narrow(total * (1.0 / (KERNEL_H * KERNEL_W)), out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * C + there, average, mask=inside)


def windows(kernel, stride) -> dict:
    """The constexpr arguments that place windows."""
    names = [f"{what}_{axis}" for what in ("KERNEL", "STRIDE") for axis in "HW"]
    return dict(zip(names, (*kernel, *stride), strict=True))


def run(x: Tensor, scale: Tensor, shift: Tensor, kernel=(2, 2), stride=(2, 2)) -> Tensor:
    """See :mod:`resnet_fused.ops.norm_relu_avg_pool`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    name = "norm_relu_avg_pool"
    checks.data(name, "x", x)
    checks.pair(name, "scale", scale, "shift", shift, x)
    out = op.fake(x, scale, shift, kernel, stride)
    if x.numel():
        plan = common.tiling(out, TILE_BYTES // x.element_size(), CAP, common.POINTWISE_PROGRAMS)
        h, w = out.shape[2:]
        sizes = {"H": x.shape[2], "W": x.shape[3], "W_OUT": w, "HW_OUT": h * w}
        meta = sizes | windows(kernel, stride) | {"UNROLLED": kernel[0] * kernel[1] <= UNROLL}
        common.launch(norm_relu_avg_pool_kernel, plan, x, scale, shift, out, **meta)
    return out


KERNEL = common.register(op.OP, run)
