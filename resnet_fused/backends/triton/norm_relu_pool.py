"""`norm_relu_pool` in Triton: a program per tile of output pixels and channels, which loads its windows directly.

Bytes moved per element of z (16-bit, 3x3 windows of stride 2): 2 read, 1/2 written for out and 1/4 for index. A pixel
is loaded once for each window over it, 9/4 times; all but the first come from L1 or L2, as tiles of neighbouring rows
run at the same time. Memory-bound; not measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import norm_relu_pool as op
from ...ops.contract import Tensor, channels_last_strides
from . import checks, common
from .common import clamp_below_zero, first_row, narrow, rows_in, widen

TILE_BYTES, CAP = 2048, 64  # of activations: 16 bytes a thread
UNROLL = 16  # places of a window, beyond which its rows are a loop


@triton.jit
def pixels_from(row, W, HW, BLOCK_M: tl.constexpr):
    """Sample (int64), row and column of the pixels from `row` on; one 64-bit division per tile."""
    sample = row // HW
    within = (row - sample * HW).to(tl.int32) + tl.arange(0, BLOCK_M)
    further = within // HW
    pixel = within - further * HW
    h = pixel // W
    return sample + further, h, pixel - h * W


@triton.jit
def compare_row(
    best, place, z_ptr, offsets, scale, shift, h, w, inside, r, C, H, W,
    KERNEL_W: tl.constexpr,
):  # fmt: skip
    """Let row `r` of the windows challenge the winners so far; a window's first pixel is (h, w), at `offsets`."""
    in_row = (h + r >= 0) & (h + r < H)
    for s in tl.static_range(KERNEL_W):
        there = inside & (in_row & (w + s >= 0) & (w + s < W))[:, None]
        pointers = z_ptr + (r * W + s).to(tl.int64) * C + offsets
        y = tl.fma(widen(tl.load(pointers, mask=there, other=0.0)), scale, shift)
        value = widen(narrow(clamp_below_zero(y), z_ptr.dtype.element_ty))
        wins = there & ((value > best) | (value != value))
        best = tl.where(wins, value, best)
        place = tl.where(wins, r * KERNEL_W + s, place)
    return best, place


@triton.jit(do_not_specialize=["M", "UNITS", "TILES", "H", "W", "W_OUT", "HW_OUT"])
def norm_relu_pool_kernel(
    z_ptr, scale_ptr, shift_ptr,  # [N * H * W, C], [C], [C]
    out_ptr, index_ptr,  # [M, C] each
    M, UNITS, TILES, H, W, W_OUT, HW_OUT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, UNROLLED: tl.constexpr,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
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
        h = h * STRIDE_H - PADDING_H
        w = w * STRIDE_W - PADDING_W
        offsets = ((sample * H + h) * W + w)[:, None] * C + cols[None, :]
        best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
        place = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
        if UNROLLED:
            for r in tl.static_range(KERNEL_H):
                best, place = compare_row(best, place, z_ptr, offsets, scale, shift, h, w, inside, r, C, H, W, KERNEL_W)
        else:
            for r in tl.range(0, KERNEL_H):
                best, place = compare_row(best, place, z_ptr, offsets, scale, shift, h, w, inside, r, C, H, W, KERNEL_W)
        there = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
        tl.store(out_ptr + row * C + there, narrow(best, out_ptr.dtype.element_ty), mask=inside)
        tl.store(index_ptr + row * C + there, place.to(tl.uint8), mask=inside)


def windows(kernel, stride, padding) -> dict:
    """The constexpr arguments that place windows."""
    names = [f"{what}_{axis}" for what in ("KERNEL", "STRIDE", "PADDING") for axis in "HW"]
    return dict(zip(names, (*kernel, *stride, *padding), strict=True))


def run(z: Tensor, scale: Tensor, shift: Tensor, kernel=(3, 3), stride=(2, 2), padding=(1, 1)) -> tuple[Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.norm_relu_pool`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    name = "norm_relu_pool"
    checks.data(name, "z", z)
    checks.pair(name, "scale", scale, "shift", shift, z)
    shape = op.pooled_shape(z, kernel, stride, padding)
    strides = channels_last_strides(shape)
    out = z.new_empty_strided(shape, strides)
    index = z.new_empty_strided(shape, strides, dtype=torch.uint8)
    if z.numel():
        plan = common.tiling(out, TILE_BYTES // z.element_size(), CAP, common.POINTWISE_PROGRAMS)
        sizes = {"H": z.shape[2], "W": z.shape[3], "W_OUT": shape[3], "HW_OUT": shape[2] * shape[3]}
        meta = sizes | windows(kernel, stride, padding) | {"UNROLLED": kernel[0] * kernel[1] <= UNROLL}
        common.launch(norm_relu_pool_kernel, plan, z, scale, shift, out, index, **meta)
    return out, index


KERNEL = common.register(op.OP, run)
