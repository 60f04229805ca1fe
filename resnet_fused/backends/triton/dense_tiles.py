"""What the kernels of dense blocks share: some channels of every pixel, neighbours of pixels, checks and merges.

A slice is C channels of pixels that lie PITCH channels apart. Both arrive as UNITS times one DIV, the largest power of
two up to 16 that divides all of a launch's counts and pitches of that side, so that accesses stay as wide as they can.

A 3x3 convolution reads, for a tile of consecutive pixels, nine such tiles, each moved by one of its taps: rows and
columns of the image are compared in registers, and what lies outside of it is zero. Eight of the nine come out of L1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...ops.contract import DATA_DTYPES, Tensor, is_slice, pitch
from . import checks, common, dense_configs  # noqa: F401  whose tiles every kernel here takes
from .gemm import split
from .split_sums import MERGE, merge_tile

TAPS = 9
_TAPS = tl.constexpr(TAPS)

# Host side ------------------------------------------------------------------------------------------------------


def units(channels: int, *slices: Tensor) -> tuple[int, list[int]]:
    """DIV, and UNITS of the channels and of the pitch of each slice."""
    counts = [channels, *map(pitch, slices)]
    _, div = split(math.gcd(*counts))
    return div, [count // div for count in counts]


def check_slice(op: str, name: str, t: Tensor, like: Tensor | None = None, channels: int | None = None) -> None:
    """Channels of a channels_last tensor, of the dtype, device and pixels of `like`, and so many of them."""
    if t.dim() != 4:
        checks.fail(op, f"{name} has shape {list(t.shape)}; pass a [N, C, H, W] tensor")
    if t.dtype not in DATA_DTYPES:
        checks.fail(op, f"{name} is {t.dtype}; pass float32, bfloat16 or float16")
    if like is not None:
        checks.device(op, name, t, like)
        if t.dtype != like.dtype:
            checks.fail(op, f"{name} is {t.dtype} but the activations are {like.dtype}; pass one dtype")
        wanted = like.shape[0], like.shape[1] if channels is None else channels, *like.shape[2:]
        if tuple(t.shape) != tuple(wanted):
            checks.fail(op, f"{name} has shape {list(t.shape)}; pass a {list(wanted)} tensor")
    if not is_slice(t):
        checks.fail(op, f"{name} of shape {list(t.shape)} is neither channels_last nor channels of such a tensor; "
                        f"pass {name}.contiguous(memory_format=torch.channels_last)")  # fmt: skip


def check_taps(op: str, weight: Tensor, z: Tensor) -> bool:
    """A 3x3 weight for `z`, dense; whether it lies in channels_last."""
    checks.device(op, "weight", weight, z)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (z.shape[1], 3, 3):
        checks.fail(op, f"weight has shape {list(weight.shape)}; pass a [G, {z.shape[1]}, 3, 3] weight")
    if weight.dtype != z.dtype:
        checks.fail(op, f"weight is {weight.dtype} but the activations are {z.dtype}; pass one dtype")
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    if not channels_last and not weight.is_contiguous():
        checks.fail(op, "weight is neither contiguous nor channels_last; pass weight.contiguous()")
    return channels_last


def merge(weights: Tensor, sums: Tensor, results: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add the splits ``[splits, ...]`` of a weight's gradient and those ``[2, chunks, C]`` of two sums, in one launch.

    `results`: both sums, and the weight's gradient, which lies as a split of it does.
    """
    *both, grad_weight = results
    chunks, c = sums.shape[1:]
    weight_tiles, sum_tiles = common.cdiv(grad_weight.numel(), MERGE["BLOCK"]), common.cdiv(c, MERGE["BLOCK"])
    total, div = split(grad_weight.numel())
    sizes = {"splits": len(weights), "chunks": chunks, "UNITS": total, "C": c, "weight_tiles": weight_tiles}
    sizes |= {"sum_tiles": sum_tiles, "DIV": div}
    programs = weight_tiles + 2 * sum_tiles
    common.start(dense_merge_kernel, programs, weights, sums, grad_weight, *both, **sizes, **MERGE)


# Device side ----------------------------------------------------------------------------------------------------


@triton.jit
def load_slice(ptr, row, column, in_rows, C, PITCH, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of a slice as it is, zero where it does not exist."""
    cols = column + tl.arange(0, BLOCK_C)
    offsets = tl.arange(0, BLOCK_M)[:, None] * PITCH + cols[None, :]
    return tl.load(ptr + row * PITCH + offsets, mask=in_rows[:, None] & (cols < C)[None, :], other=0.0)


@triton.jit
def store_slice(ptr, values, row, column, in_rows, C, PITCH, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write a tile of a slice, as far as it exists."""
    cols = column + tl.arange(0, BLOCK_C)
    offsets = tl.arange(0, BLOCK_M)[:, None] * PITCH + cols[None, :]
    tl.store(ptr + row * PITCH + offsets, values, mask=in_rows[:, None] & (cols < C)[None, :])


@triton.jit
def neighbours(h, w, in_rows, down, right, H, W):
    """Which of the pixels `down` rows below and `right` columns beside those of a tile exist."""
    return in_rows & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)


@triton.jit
def load_tap(
    ptr, tap, g, k, G, K,
    CHANNELS_LAST: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_G, BLOCK_K] of one tap of a weight [G, K, 3, 3], zero where it does not exist."""
    gs, ks = g + tl.arange(0, BLOCK_G), k + tl.arange(0, BLOCK_K)
    if CHANNELS_LAST:
        offsets = (gs * _TAPS + tap)[:, None] * K + ks[None, :]
    else:
        offsets = (gs[:, None] * K + ks[None, :]) * _TAPS + tap
    return tl.load(ptr + offsets, mask=(gs < G)[:, None] & (ks < K)[None, :], other=0.0)


@triton.jit
def affine_gradient(g, z, b, d):
    """``g + (b*z + d)`` in float32; without the term in z where b is 0: it may not be finite."""
    return g + tl.fma(tl.where(b == 0, 0.0, z), b, d)


@triton.jit(do_not_specialize=["splits", "chunks", "UNITS", "C", "weight_tiles", "sum_tiles"])
def dense_merge_kernel(
    weights_ptr, sums_ptr,  # [splits, UNITS*DIV], [2, chunks, C]
    weight_ptr, first_ptr, second_ptr,  # [UNITS*DIV], [C], [C]
    splits, chunks, UNITS, C, weight_tiles, sum_tiles,
    DIV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < weight_tiles:
        merge_tile(weights_ptr, weight_ptr, tile, splits, UNITS * DIV, BLOCK_S, BLOCK)
    else:
        tile -= weight_tiles
        if tile < sum_tiles:
            merge_tile(sums_ptr, first_ptr, tile, chunks, C, BLOCK_S, BLOCK)
        else:
            second = sums_ptr + chunks.to(tl.int64) * C
            merge_tile(second, second_ptr, tile - sum_tiles, chunks, C, BLOCK_S, BLOCK)
