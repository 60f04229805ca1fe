"""`dense_conv3x3_backward` in Triton: a product for each gradient, and a third launch that adds their partial sums.

* The gradient at a pixel is a sum over its nine neighbours' ``dy``: as :mod:`.dense_conv3x3`, a loop over taps and
  channels, which applies ``dy`` on load; the epilogue masks by the recomputed sign and sums what it stores.
* The weight's: a program has three taps, one row of the kernel's, and a split of the rows. It loads a tile of z once,
  normalises it, and for each tap multiplies it by ``dy`` as it lies beside it.

Bytes moved per pixel (16-bit): 8 G for grad and y and 4 K for z, as both products read them, and 2 K written. Through
cuDNN, with dy, the activation and the unmasked gradient written, it would be 10 G + 14 K. One kernel for both products
would read 4 G + 2 K less; it was compiled and spilled: nine accumulators, and the addresses of nine tiles. Neighbours,
and what programs beside it read, come out of L1 and L2. Partial sums of 72 G K bytes a split, mostly within L2. No
atomics. Compiled and interpreted, not yet run on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import dense_conv3x3_backward as op
from ...ops.contract import Tensor, channels_last_like
from .. import cards
from . import checks, common, conv1x1_dgrad, gemm, splits
from .common import first_row, narrow, rows_in, widen
from .dense_tiles import (
    TAPS,
    affine_gradient,
    check_slice,
    check_taps,
    load_slice,
    load_tap,
    merge,
    neighbours,
    units,
)
from .gemm import apply_activation, dot, tile_of
from .lazy_tiles import load_row, load_tile, store_tile
from .norm_relu_pool import pixels_from

NAME = op.OP.name
WGRAD = "dense_conv3x3_wgrad"
_TAPS = tl.constexpr(TAPS)


@triton.jit
def load_gradient(
    grad_ptr, y_ptr, b_ptr, d_ptr, row, column, h, w, in_rows, down, right, G, GRAD, Y, H, W,
    dtype: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """``dy`` at the pixels `down` rows below and `right` columns beside those from `row` on, zero outside."""
    there = neighbours(h, w, in_rows, down, right, H, W)
    at = row + (down * W + right)
    grad = widen(load_slice(grad_ptr, at, column, there, G, GRAD, BLOCK_M, BLOCK_G))
    y = widen(load_slice(y_ptr, at, column, there, G, Y, BLOCK_M, BLOCK_G))
    dy = affine_gradient(grad, y, load_row(b_ptr, column, G, BLOCK_G), load_row(d_ptr, column, G, BLOCK_G))
    return narrow(tl.where(there[:, None], dy, 0.0), dtype)


@triton.jit(do_not_specialize=["chunks", "M", "UNITS_K", "UNITS_G", "UNITS_GRAD", "UNITS_Y", "TILES", "H", "W"])
def dense_conv3x3_dgrad_kernel(
    grad_ptr, y_ptr, b_ptr, d_ptr,  # G of the channels of M pixels, twice; [G], [G]
    z_ptr, weight_ptr, scale_ptr, shift_ptr, mean_ptr,  # [M, K], [G, K, 3, 3], [K] three times
    g_ptr, partial_ptr,  # [M, K], [2, chunks, K]: sums of g and of g * (z - mean)
    chunks, M, UNITS_K, UNITS_G, UNITS_GRAD, UNITS_Y, TILES, H, W,
    DIV_K: tl.constexpr, DIV_G: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # of K, of G
):  # fmt: skip
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    K = UNITS_K * DIV_K
    G = UNITS_G * DIV_G
    chunk, column_tile = tile_of(tl.program_id(0), tl.cdiv(K, BLOCK_N))
    column = column_tile * BLOCK_N
    steps = tl.cdiv(G, BLOCK_K)
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gz = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(0, TILES):
        row = first_row(chunk, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        _sample, h, w = pixels_from(row, W, H * W, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, steps * _TAPS):
            tap = step // steps
            at = (step - tap * steps) * BLOCK_K
            dy = load_gradient(grad_ptr, y_ptr, b_ptr, d_ptr, row, at, h, w, in_rows, 1 - tap // 3, 1 - tap % 3, G,
                               UNITS_GRAD * DIV_G, UNITS_Y * DIV_G, H, W, dtype, BLOCK_M, BLOCK_K)  # fmt: skip
            weight = load_tap(weight_ptr, tap, at, column, G, K, CHANNELS_LAST, BLOCK_K, BLOCK_N)
            acc = dot(dy, weight, acc, PRECISION)
        z = widen(load_tile(z_ptr, row, column, in_rows, K, BLOCK_M, BLOCK_N))
        before = tl.fma(z, load_row(scale_ptr, column, K, BLOCK_N), load_row(shift_ptr, column, K, BLOCK_N))
        g = narrow(tl.where(before <= 0, 0.0, acc), dtype)
        store_tile(g_ptr, g, row, column, in_rows, K, BLOCK_M, BLOCK_N)
        rounded = tl.where(in_rows[:, None], widen(g), 0.0)
        sum_g += tl.sum(rounded, axis=0)
        sum_gz += tl.sum(rounded * (z - load_row(mean_ptr, column, K, BLOCK_N)), axis=0)
    cols = column + tl.arange(0, BLOCK_N)
    where = partial_ptr + chunk.to(tl.int64) * K + cols
    tl.store(where, sum_g, mask=cols < K)
    tl.store(where + chunks.to(tl.int64) * K, sum_gz, mask=cols < K)


@triton.jit(do_not_specialize=["M", "UNITS_K", "UNITS_G", "UNITS_GRAD", "UNITS_Y", "TILES", "H", "W"])
def dense_conv3x3_wgrad_kernel(
    grad_ptr, y_ptr, b_ptr, d_ptr,  # as above
    z_ptr, scale_ptr, shift_ptr,
    grad_weight_ptr,  # splits of the weight
    M, UNITS_K, UNITS_G, UNITS_GRAD, UNITS_Y, TILES, H, W,
    DIV_K: tl.constexpr, DIV_G: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # of K, of G
):  # fmt: skip
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    K = UNITS_K * DIV_K
    G = UNITS_G * DIV_G
    tiles = tl.cdiv(K, BLOCK_N) * 3
    split, tile = tile_of(tl.program_id(0), tl.cdiv(G, BLOCK_K) * tiles)
    outs, tile = tile_of(tile, tiles)
    column, tap_row = tile_of(tile, 3)
    outs, column = outs * BLOCK_K, column * BLOCK_N
    left = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    middle = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    right = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    scale = load_row(scale_ptr, column, K, BLOCK_N)
    shift = load_row(shift_ptr, column, K, BLOCK_N)
    down = 1 - tap_row
    for i in tl.range(0, TILES):
        row = first_row(split, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        _sample, h, w = pixels_from(row, W, H * W, BLOCK_M)
        z = apply_activation(load_tile(z_ptr, row, column, in_rows, K, BLOCK_M, BLOCK_N), scale, shift, dtype)
        # What has no neighbour there, or is none, may be infinite, and times zero that is NaN.
        dy = load_gradient(grad_ptr, y_ptr, b_ptr, d_ptr, row, outs, h, w, in_rows, down, 1, G,
                           UNITS_GRAD * DIV_G, UNITS_Y * DIV_G, H, W, dtype, BLOCK_M, BLOCK_K)  # fmt: skip
        there = neighbours(h, w, in_rows, down, 1, H, W)
        left = dot(tl.trans(tl.where(there[:, None], z, 0.0)), dy, left, PRECISION)
        dy = load_gradient(grad_ptr, y_ptr, b_ptr, d_ptr, row, outs, h, w, in_rows, down, 0, G,
                           UNITS_GRAD * DIV_G, UNITS_Y * DIV_G, H, W, dtype, BLOCK_M, BLOCK_K)  # fmt: skip
        there = neighbours(h, w, in_rows, down, 0, H, W)
        middle = dot(tl.trans(tl.where(there[:, None], z, 0.0)), dy, middle, PRECISION)
        dy = load_gradient(grad_ptr, y_ptr, b_ptr, d_ptr, row, outs, h, w, in_rows, down, -1, G,
                           UNITS_GRAD * DIV_G, UNITS_Y * DIV_G, H, W, dtype, BLOCK_M, BLOCK_K)  # fmt: skip
        there = neighbours(h, w, in_rows, down, -1, H, W)
        right = dot(tl.trans(tl.where(there[:, None], z, 0.0)), dy, right, PRECISION)
    ks, gs = column + tl.arange(0, BLOCK_N), outs + tl.arange(0, BLOCK_K)
    base = grad_weight_ptr + split.to(tl.int64) * (K * G * _TAPS)
    inside = (ks < K)[:, None] & (gs < G)[None, :]
    step = 1
    if CHANNELS_LAST:
        offsets = (gs * _TAPS + tap_row * 3)[None, :] * K + ks[:, None]
        step = K
    else:
        offsets = (gs[None, :] * K + ks[:, None]) * _TAPS + tap_row * 3
    tl.store(base + offsets, left, mask=inside)
    tl.store(base + offsets + step, middle, mask=inside)
    tl.store(base + offsets + 2 * step, right, mask=inside)


def check(grad, y, b, d, z, weight, scale, shift, mean) -> bool:
    """Raise RuntimeError on arguments that do not fit; whether the weight lies in channels_last."""
    checks.data(NAME, "z", z)
    channels_last = check_taps(NAME, weight, z)
    check_slice(NAME, "grad", grad, z, weight.shape[0])
    check_slice(NAME, "y", y, grad)
    for name, vector, like in (("b", b, grad), ("d", d, grad), ("scale", scale, z), ("shift", shift, z)):
        checks.vector(NAME, name, vector, like)
    checks.vector(NAME, "mean", mean, z)
    return channels_last


def start_dgrad(gradient: tuple, z: Tensor, weight: Tensor, norm: tuple, g: Tensor, sizes: dict) -> Tensor:
    """Launch the product that makes `g`; the partial sums ``[2, chunks, K]`` of it."""
    growth, k = weight.shape[:2]
    config = gemm.configuration(NAME, z, k, growth)
    column_tiles, card = common.cdiv(k, config.block_n), cards.of(z.device)
    tiles, chunks = conv1x1_dgrad.row_tiles(sizes["M"], config.block_m, column_tiles, True, card)
    partial = z.new_empty((2, chunks, k), dtype=torch.float32)
    sizes = sizes | {"chunks": chunks, "TILES": tiles, "PRECISION": gemm.precision(z.dtype)}
    sizes |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    kernel, programs = dense_conv3x3_dgrad_kernel, chunks * column_tiles
    gemm.launch(kernel, programs, config, *gradient, z, weight, *norm, g, partial, **sizes)
    return partial


def start_wgrad(gradient: tuple, z: Tensor, scale: Tensor, shift: Tensor, like: Tensor, sizes: dict) -> Tensor:
    """Launch the product that makes the weight's gradient: its splits, each laid out as `like`."""
    growth, k = like.shape[:2]
    config = gemm.configuration(WGRAD, z, k, growth)
    tiles = 3 * common.cdiv(k, config.block_n) * common.cdiv(growth, config.block_k)
    moved, partial_bytes = (2 * growth + k) * z.element_size(), 8 * like.numel()
    card = cards.of(z.device)
    split = splits.choose(sizes["M"], tiles, moved, partial_bytes, config.block_m, card.sms, splits.resident(config))
    weights = z.new_empty((split.splits, like.numel()), dtype=torch.float32)
    sizes = sizes | {"TILES": split.row_tiles, "PRECISION": gemm.precision(z.dtype)}
    sizes |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    kernel, programs = dense_conv3x3_wgrad_kernel, split.splits * tiles
    gemm.launch(kernel, programs, config, *gradient, z, scale, shift, weights, **sizes)
    return weights


def run(
    grad: Tensor,
    y: Tensor,
    b: Tensor,
    d: Tensor,
    z: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.dense_conv3x3_backward`. Raises RuntimeError on arguments that do not fit."""
    channels_last = check(grad, y, b, d, z, weight, scale, shift, mean)
    (n, k, h, w), growth = z.shape, grad.shape[1]
    g, grad_weight = channels_last_like(z), torch.empty_like(weight)
    sums = tuple(z.new_empty(k, dtype=torch.float32) for _ in range(2))
    if not (z.numel() and growth):
        return g.zero_(), *(t.zero_() for t in (*sums, grad_weight))
    (units_k, div_k), (div_g, (units_g, *pitches)) = gemm.split(k), units(growth, grad, y)
    sizes = {"M": n * h * w, "UNITS_K": units_k, "UNITS_G": units_g, "UNITS_GRAD": pitches[0], "UNITS_Y": pitches[1]}
    sizes |= {"H": h, "W": w, "DIV_K": div_k, "DIV_G": div_g, "CHANNELS_LAST": channels_last}
    gradient = (grad, y, b, d)
    weights = start_wgrad(gradient, z, scale, shift, grad_weight, sizes)
    partial = start_dgrad(gradient, z, weight, (scale, shift, mean), g, sizes)
    merge(weights, partial, (*sums, grad_weight))
    return g, *sums, grad_weight


KERNEL = common.register(op.OP, run)
