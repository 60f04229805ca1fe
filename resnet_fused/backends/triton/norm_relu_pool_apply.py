"""`norm_relu_pool_apply` in Triton: each tile of input pixels gathers its gradient and writes dz.

Bytes moved per element of z (16-bit, 3x3 windows of stride 2): 2 read for z, 1/2 for grad_out and 1/4 for index, and 2
written. grad_out and index are asked for 9/4 times; all but the first come from L1 or L2. Memory-bound; not measured on
hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops import norm_relu_pool_apply as op
from ...ops.contract import Tensor, channels_last_like
from . import checks, common
from .common import first_row, narrow, rows_in, widen
from .norm_relu_pool_backward import check, gather, sizes

TILE_BYTES, CAP = 2048, 64  # 16 bytes of activations a thread


@triton.jit(do_not_specialize=["M", "UNITS", "TILES", "H", "W", "H_OUT", "W_OUT"])
def norm_relu_pool_apply_kernel(
    grad_ptr, index_ptr, z_ptr,  # [N * H_OUT * W_OUT, C] twice, [M, C]
    a_ptr, b_ptr, d_ptr,  # [C], the last two together or None
    scale_ptr, shift_ptr,  # [C] each
    dz_ptr,  # [M, C]
    M, UNITS, TILES, H, W, H_OUT, W_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, UNROLLED: tl.constexpr,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
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
        z = widen(tl.load(z_ptr + row * C + there, mask=inside, other=0.0))
        g = gather(
            grad_ptr, index_ptr, row, cols, inside, C, H, W, H_OUT, W_OUT,
            KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, UNROLLED, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        dz = tl.where(tl.fma(z, scale, shift) <= 0, 0.0, g) * a
        if b_ptr is not None:
            dz = dz + tl.fma(z, b, d)
        tl.store(dz_ptr + row * C + there, narrow(dz, dz_ptr.dtype.element_ty), mask=inside)


def run(
    grad_out: Tensor,
    index: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    kernel=(3, 3),
    stride=(2, 2),
    padding=(1, 1),
) -> Tensor:
    """See :mod:`resnet_fused.ops.norm_relu_pool_apply`. Raises RuntimeError on arguments that do not fit."""
    name = "norm_relu_pool_apply"
    check(name, grad_out, index, z, kernel, stride, padding)
    checks.vector(name, "a", a, z)
    checks.pair(name, "b", b, "d", d, z)
    checks.pair(name, "scale", scale, "shift", shift, z)
    dz = channels_last_like(z)
    if z.numel():
        plan = common.tiling(z, TILE_BYTES // z.element_size(), CAP, common.POINTWISE_PROGRAMS)
        meta = sizes(grad_out, z, kernel, stride, padding)
        vectors = (a, b, d, scale, shift)
        common.launch(norm_relu_pool_apply_kernel, plan, grad_out, index, z, *vectors, dz, **meta)
    return dz


KERNEL = common.register(op.OP, run)
