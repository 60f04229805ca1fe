"""`norm_relu_avg_pool_backward` in Triton: each tile of pixels gathers its gradient and sums it. No atomics.

Bytes moved per element of x (16-bit, 2x2 windows of stride 2): 2 read for x and 1/2 for grad_out, which its four pixels
ask for; all but the first come from L1 or L2. The partial sums cost 8 bytes per channel and chunk. Memory-bound; not
measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import norm_relu_avg_pool_backward as op
from ...ops.contract import Tensor
from . import checks, chunk_sums, common
from .common import first_row, rows_in, widen
from .norm_relu_avg_pool import windows
from .norm_relu_pool import pixels_from
from .norm_relu_pool_backward import UNROLL

TILE_BYTES, CAP, MIN_TILES = 2048, 64, 4  # 16 bytes of activations a thread


@triton.jit
def spread_window(
    g, grad_ptr, offsets, h, w, inside, i, j, C, H_OUT, W_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
):  # fmt: skip
    """Add the gradient of the window `i` rows and `j` columns before the last one over each pixel, if it covers that.

    h, w: coordinates of the pixels; offsets: where their last windows lie.
    """
    last_h, last_w = h // STRIDE_H, w // STRIDE_W
    covers = (h - (last_h - i) * STRIDE_H < KERNEL_H) & (last_h >= i) & (last_h < H_OUT + i)
    covers = covers & (w - (last_w - j) * STRIDE_W < KERNEL_W) & (last_w >= j) & (last_w < W_OUT + j)
    pointers = grad_ptr + (offsets - (i * W_OUT + j).to(tl.int64) * C)
    return g + widen(tl.load(pointers, mask=inside & covers[:, None], other=0.0))


@triton.jit
def spread(
    grad_ptr, row, cols, inside, C, H, W, H_OUT, W_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    UNROLLED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of the tile of pixels from `row` on, before the ReLU's mask; float32."""
    OVER_H: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    OVER_W: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W
    sample, h, w = pixels_from(row, W, H * W, BLOCK_M)
    offsets = ((sample * H_OUT + h // STRIDE_H) * W_OUT + w // STRIDE_W)[:, None] * C + cols[None, :]
    g = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if UNROLLED:
        for i in tl.static_range(OVER_H):
            for j in tl.static_range(OVER_W):
                g = spread_window(
                    g, grad_ptr, offsets, h, w, inside, i, j, C, H_OUT, W_OUT, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W
                )
    else:
        for i in tl.range(0, OVER_H):
            for j in tl.range(0, OVER_W):
                g = spread_window(
                    g, grad_ptr, offsets, h, w, inside, i, j, C, H_OUT, W_OUT, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W
                )
    return g * (1.0 / (KERNEL_H * KERNEL_W))


@triton.jit(do_not_specialize=["chunks", "M", "UNITS", "TILES", "H", "W", "H_OUT", "W_OUT"])
def norm_relu_avg_pool_backward_kernel(
    grad_ptr, x_ptr,  # [N * H_OUT * W_OUT, C], [M, C]
    mean_ptr, scale_ptr, shift_ptr,  # [C] each
    partial_ptr,  # [2, chunks, C]: sum_g, sum_gz
    chunks, M, UNITS, TILES, H, W, H_OUT, W_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    UNROLLED: tl.constexpr, DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    column_tiles = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    cols = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    mean = tl.load(mean_ptr + cols, mask=in_cols, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
    shift = tl.load(shift_ptr + cols, mask=in_cols, other=0.0)[None, :]
    there = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_gz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        inside = rows_in(row, M, BLOCK_M)[:, None] & in_cols[None, :]
        x = widen(tl.load(x_ptr + row * C + there, mask=inside, other=0.0))
        g = spread(
            grad_ptr, row, cols, inside, C, H, W, H_OUT, W_OUT,
            KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, UNROLLED, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        g = tl.where(tl.fma(x, scale, shift) <= 0, 0.0, g)
        sum_g += g
        sum_gz = tl.fma(g, x - mean, sum_gz)
    where = partial_ptr + chunk.to(tl.int64) * C + cols
    tl.store(where, tl.sum(sum_g, axis=0), mask=in_cols)
    tl.store(where + chunks.to(tl.int64) * C, tl.sum(sum_gz, axis=0), mask=in_cols)


def check(op_name: str, grad_out: Tensor, x: Tensor, kernel, stride) -> None:
    """Raise RuntimeError on wrong shapes, dtypes, devices, layouts of the tensors that both halves take."""
    checks.data(op_name, "x", x)
    checks.device(op_name, "grad_out", grad_out, x)
    if grad_out.dtype != x.dtype:
        checks.fail(op_name, f"grad_out is {grad_out.dtype}; pass {x.dtype}")
    op.check_shape(op_name, grad_out, x, kernel, stride)
    checks.layout(op_name, "grad_out", grad_out)


def sizes(grad_out: Tensor, x: Tensor, kernel, stride) -> dict:
    """Arguments of `spread`."""
    (h, w), (h_out, w_out) = x.shape[2:], grad_out.shape[2:]
    over = common.cdiv(kernel[0], stride[0]) * common.cdiv(kernel[1], stride[1])
    found = {"H": h, "W": w, "H_OUT": h_out, "W_OUT": w_out, "UNROLLED": over <= UNROLL}
    return found | windows(kernel, stride)


def run(
    grad_out: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, kernel=(2, 2), stride=(2, 2)
) -> tuple[Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.norm_relu_avg_pool_backward`. Raises RuntimeError on arguments that do not fit."""
    name, c = "norm_relu_avg_pool_backward", x.shape[1]
    check(name, grad_out, x, kernel, stride)
    checks.vector(name, "mean", mean, x)
    checks.pair(name, "scale", scale, "shift", shift, x)
    vector = x.new_empty if x.numel() else x.new_zeros  # sums over nothing are zero
    sum_g, sum_gz = (vector(c, dtype=torch.float32) for _ in range(2))
    if x.numel():
        plan = common.tiling(x, TILE_BYTES // x.element_size(), CAP, common.REDUCTION_PROGRAMS, MIN_TILES)
        partial = x.new_empty((2, plan.chunks, c), dtype=torch.float32)
        meta = sizes(grad_out, x, kernel, stride) | {"chunks": plan.chunks}
        common.launch(norm_relu_avg_pool_backward_kernel, plan, grad_out, x, mean, scale, shift, partial, **meta)
        chunk_sums.add(partial, [sum_g, sum_gz])
    return sum_g, sum_gz


KERNEL = common.register(op.OP, run)
