"""`norm_relu_pool_backward` in Triton: each tile of input pixels gathers its gradient and sums it. No atomics.

Bytes moved per element of z (16-bit, 3x3 windows of stride 2): 2 read for z, 1/2 for grad_out and 1/4 for index. The
latter two are asked for 9/4 times; all but the first come from L1 or L2. The partial sums cost 16 bytes per channel and
chunk. Memory-bound; not measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import norm_relu_pool_backward as op
from ...ops.contract import Tensor
from . import checks, chunk_sums, common
from .common import first_row, rows_in, widen
from .norm_relu_pool import pixels_from, windows

TILE_BYTES, CAP, MIN_TILES = 2048, 64, 4  # 16 bytes of activations a thread
UNROLL = 4  # windows over a pixel, beyond which they are a loop


@triton.jit
def gather_window(
    g, grad_ptr, index_ptr, offsets, h, w, inside, i, j, C, H_OUT, W_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
):  # fmt: skip
    """Add what the window `i` rows and `j` columns before the last one over each pixel sends there.

    h, w: padded coordinates of the pixels; offsets: where their last windows lie.
    """
    last_h, last_w = h // STRIDE_H, w // STRIDE_W
    r, s = h - (last_h - i) * STRIDE_H, w - (last_w - j) * STRIDE_W
    covers = (r < KERNEL_H) & (last_h >= i) & (last_h < H_OUT + i)
    covers = covers & (s < KERNEL_W) & (last_w >= j) & (last_w < W_OUT + j)
    there = inside & covers[:, None]
    offsets -= (i * W_OUT + j).to(tl.int64) * C
    winner = tl.load(index_ptr + offsets, mask=there, other=255).to(tl.int32)
    grad = widen(tl.load(grad_ptr + offsets, mask=there, other=0.0))
    return g + tl.where(winner == (r * KERNEL_W + s)[:, None], grad, 0.0)


@triton.jit
def gather(
    grad_ptr, index_ptr, row, cols, inside, C, H, W, H_OUT, W_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, UNROLLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The pooled gradient of the tile of input pixels from `row` on, before the ReLU's mask; float32."""
    OVER_H: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    OVER_W: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W
    sample, h, w = pixels_from(row, W, H * W, BLOCK_M)
    h += PADDING_H
    w += PADDING_W
    offsets = ((sample * H_OUT + h // STRIDE_H) * W_OUT + w // STRIDE_W)[:, None] * C + cols[None, :]
    g = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if UNROLLED:
        for i in tl.static_range(OVER_H):
            for j in tl.static_range(OVER_W):
                g = gather_window(
                    g, grad_ptr, index_ptr, offsets, h, w, inside, i, j, C, H_OUT, W_OUT,
                    KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W,
                )  # fmt: skip
    else:
        for i in tl.range(0, OVER_H):
            for j in tl.range(0, OVER_W):
                g = gather_window(
                    g, grad_ptr, index_ptr, offsets, h, w, inside, i, j, C, H_OUT, W_OUT,
                    KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W,
                )  # fmt: skip
    return g


@triton.jit(do_not_specialize=["chunks", "M", "UNITS", "TILES", "H", "W", "H_OUT", "W_OUT"])
def norm_relu_pool_backward_kernel(
    grad_ptr, index_ptr, z_ptr,  # [N * H_OUT * W_OUT, C] twice, [M, C]
    mean_ptr, scale_ptr, shift_ptr,  # [C] each
    partial_ptr,  # [2, chunks, C]: sum_g, sum_gz
    chunks, M, UNITS, TILES, H, W, H_OUT, W_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, UNROLLED: tl.constexpr,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
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
        z = widen(tl.load(z_ptr + row * C + there, mask=inside, other=0.0))
        g = gather(
            grad_ptr, index_ptr, row, cols, inside, C, H, W, H_OUT, W_OUT,
            KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, UNROLLED, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        g = tl.where(tl.fma(z, scale, shift) <= 0, 0.0, g)
        sum_g += g
        sum_gz = tl.fma(g, z - mean, sum_gz)
    where = partial_ptr + chunk.to(tl.int64) * C + cols
    tl.store(where, tl.sum(sum_g, axis=0), mask=in_cols)
    tl.store(where + chunks.to(tl.int64) * C, tl.sum(sum_gz, axis=0), mask=in_cols)


def check(op_name: str, grad_out: Tensor, index: Tensor, z: Tensor, kernel, stride, padding) -> None:
    """Raise RuntimeError on wrong shapes, dtypes, devices, layouts of the tensors that both halves take."""
    checks.data(op_name, "z", z)
    for name, t, dtype in (("grad_out", grad_out, z.dtype), ("index", index, torch.uint8)):
        checks.device(op_name, name, t, z)
        if t.dtype != dtype:
            checks.fail(op_name, f"{name} is {t.dtype}; pass {dtype}")
    op.check_shapes(op_name, grad_out, index, z, kernel, stride, padding)
    checks.layout(op_name, "grad_out", grad_out)
    checks.layout(op_name, "index", index)


def sizes(grad_out: Tensor, z: Tensor, kernel, stride, padding) -> dict:
    """Arguments of `gather`."""
    (h, w), (h_out, w_out) = z.shape[2:], grad_out.shape[2:]
    over = common.cdiv(kernel[0], stride[0]) * common.cdiv(kernel[1], stride[1])
    found = {"H": h, "W": w, "H_OUT": h_out, "W_OUT": w_out, "UNROLLED": over <= UNROLL}
    return found | windows(kernel, stride, padding)


def run(
    grad_out: Tensor,
    index: Tensor,
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel=(3, 3),
    stride=(2, 2),
    padding=(1, 1),
) -> tuple[Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.norm_relu_pool_backward`. Raises RuntimeError on arguments that do not fit."""
    name, c = "norm_relu_pool_backward", z.shape[1]
    check(name, grad_out, index, z, kernel, stride, padding)
    checks.vector(name, "mean", mean, z)
    checks.pair(name, "scale", scale, "shift", shift, z)
    vector = z.new_empty if z.numel() else z.new_zeros  # sums over nothing are zero
    sum_g, sum_gz = (vector(c, dtype=torch.float32) for _ in range(2))
    if z.numel():
        plan = common.tiling(z, TILE_BYTES // z.element_size(), CAP, common.REDUCTION_PROGRAMS, MIN_TILES)
        partial = z.new_empty((2, plan.chunks, c), dtype=torch.float32)
        meta = sizes(grad_out, z, kernel, stride, padding) | {"chunks": plan.chunks}
        vectors = (mean, scale, shift)
        common.launch(norm_relu_pool_backward_kernel, plan, grad_out, index, z, *vectors, partial, **meta)
        chunk_sums.add(partial, [sum_g, sum_gz])
    return sum_g, sum_gz


KERNEL = common.register(op.OP, run)
