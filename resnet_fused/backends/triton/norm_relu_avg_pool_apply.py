"""`norm_relu_avg_pool_apply` in Triton: each tile of pixels gathers its gradient and writes grad_x.

Bytes moved per element of x (16-bit, 2x2 windows of stride 2): 2 read for x and 1/2 for grad_out, which its four pixels
ask for, all but the first from L1 or L2; and 2 written. Memory-bound; not measured on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops import norm_relu_avg_pool_apply as op
from ...ops.contract import Tensor, channels_last_like
from . import checks, common
from .common import first_row, narrow, rows_in, widen
from .norm_relu_avg_pool_backward import check, sizes, spread

TILE_BYTES, CAP = 2048, 64  # 16 bytes of activations a thread


@triton.jit(do_not_specialize=["M", "UNITS", "TILES", "H", "W", "H_OUT", "W_OUT"])
def norm_relu_avg_pool_apply_kernel(
    grad_ptr, x_ptr,  # [N * H_OUT * W_OUT, C], [M, C]
    a_ptr, b_ptr, d_ptr,  # [C], the last two together or None
    scale_ptr, shift_ptr,  # [C] each
    grad_x_ptr,  # [M, C]
    M, UNITS, TILES, H, W, H_OUT, W_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    UNROLLED: tl.constexpr, DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    cols = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    a = tl.load(a_ptr + cols, mask=in_cols, other=0.0)[None, :]
    if b_ptr is not None:
        b = tl.load(b_ptr + cols, mask=in_cols, other=0.0)[None, :]
        d = tl.load(d_ptr + cols, mask=in_cols, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
    shift = tl.load(shift_ptr + cols, mask=in_cols, other=0.0)[None, :]
    there = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        inside = rows_in(row, M, BLOCK_M)[:, None] & in_cols[None, :]
        x = widen(tl.load(x_ptr + row * C + there, mask=inside, other=0.0))
        g = spread(
            grad_ptr, row, cols, inside, C, H, W, H_OUT, W_OUT,
            KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, UNROLLED, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        grad_x = tl.where(tl.fma(x, scale, shift) <= 0, 0.0, g) * a
        if b_ptr is not None:
            grad_x = grad_x + tl.fma(x, b, d)
        tl.store(grad_x_ptr + row * C + there, narrow(grad_x, grad_x_ptr.dtype.element_ty), mask=inside)


def run(
    grad_out: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    kernel=(2, 2),
    stride=(2, 2),
) -> Tensor:
    """See :mod:`resnet_fused.ops.norm_relu_avg_pool_apply`. Raises RuntimeError on arguments that do not fit."""
    name = "norm_relu_avg_pool_apply"
    check(name, grad_out, x, kernel, stride)
    checks.vector(name, "a", a, x)
    checks.pair(name, "b", b, "d", d, x)
    checks.pair(name, "scale", scale, "shift", shift, x)
    grad_x = channels_last_like(x)
    if x.numel():
        plan = common.tiling(x, TILE_BYTES // x.element_size(), CAP, common.POINTWISE_PROGRAMS)
        meta = sizes(grad_out, x, kernel, stride)
        common.launch(norm_relu_avg_pool_apply_kernel, plan, grad_out, x, a, b, d, scale, shift, grad_x, **meta)
    return grad_x


KERNEL = common.register(op.OP, run)
