"""Sums over pixels, second stage: the chunks' partial sums are added in order, by programs of a few channels.

Where the sums are for batch norm's backward, its per-channel arithmetic follows in the same launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...ops.contract import Tensor
from . import bn_coefficients, common
from .bn_coefficients import store_coefficients

CHUNKS, CHANNELS = 128, 8  # a tile; 8 floats are one 32-byte sector


@triton.jit
def sum_chunks(base, chunks, C, cols, in_cols, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of [chunks, C] over its rows, of the channels `cols`."""
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for k in tl.range(0, chunks, BLOCK_K):
        index = k + tl.arange(0, BLOCK_K)
        where = index.to(tl.int64)[:, None] * C + cols[None, :]
        total += tl.load(base + where, mask=(index < chunks)[:, None] & in_cols[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["chunks", "C", "channel_tiles"])
def sum_chunks_kernel(
    partial_ptr,  # [sums, chunks, C]
    first_ptr, second_ptr, third_ptr, fourth_ptr,  # [C] each; those beyond the number of sums are not touched
    chunks, C, channel_tiles,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0) // channel_tiles
    cols = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    sums = sum_chunks(partial_ptr + which.to(tl.int64) * chunks * C, chunks, C, cols, in_cols, BLOCK_K, BLOCK_C)
    if which == 0:
        tl.store(first_ptr + cols, sums, mask=in_cols)
    elif which == 1:
        tl.store(second_ptr + cols, sums, mask=in_cols)
    elif which == 2:
        tl.store(third_ptr + cols, sums, mask=in_cols)
    else:
        tl.store(fourth_ptr + cols, sums, mask=in_cols)


@triton.jit(do_not_specialize=["chunks", "C", "M"])
def coefficients_of_chunks_kernel(
    partial_ptr,  # [2, chunks, C]: sum_g, sum_gz
    mean_ptr, rstd_ptr, scale_ptr,  # [C]
    sum_g_ptr, b_ptr, d_ptr, grad_gamma_ptr,  # [C]
    chunks, C, M,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    sum_g = sum_chunks(partial_ptr, chunks, C, cols, in_cols, BLOCK_K, BLOCK_C)
    second = partial_ptr + chunks.to(tl.int64) * C
    sum_gz = sum_chunks(second, chunks, C, cols, in_cols, BLOCK_K, BLOCK_C)
    tl.store(sum_g_ptr + cols, sum_g, mask=in_cols)
    store_coefficients(sum_g, sum_gz, M, cols, in_cols, mean_ptr, rstd_ptr, scale_ptr, b_ptr, d_ptr, grad_gamma_ptr)


def add(partial: Tensor, sums: list[Tensor]) -> None:
    """Add the chunks ``[sums, chunks, C]`` of up to four sums, in order."""
    count, chunks, c = partial.shape
    tiles = common.cdiv(c, CHANNELS)
    targets = [*sums, *[partial] * (4 - count)]  # the last are never written
    sizes = {"chunks": chunks, "C": c, "channel_tiles": tiles, "BLOCK_K": CHUNKS, "BLOCK_C": CHANNELS}
    common.start(sum_chunks_kernel, tiles * count, partial, *targets, **sizes)


class Norm(NamedTuple):
    """The batch norm whose backward two sums are for."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    pixels: int


def add_for(norm: Norm, partial: Tensor, results: tuple[Tensor, ...]) -> None:
    """Add the chunks ``[2, chunks, C]`` of the sums for a batch norm's backward; `results`: sum_g, b, d, grad_gamma."""
    _, chunks, c = partial.shape
    sizes = {"chunks": chunks, "C": c, "M": norm.pixels, "BLOCK_K": CHUNKS, "BLOCK_C": CHANNELS}
    vectors = norm.mean, norm.rstd, norm.scale
    common.start(coefficients_of_chunks_kernel, common.cdiv(c, CHANNELS), partial, *vectors, *results, **sizes)


class Sums(NamedTuple):
    """The last results of an op that sums the gradient which it writes, see :data:`..bn_coefficients.RESULTS`."""

    results: tuple[Tensor, ...]
    norm: Norm | None  # None: the sums alone

    def merge(self, partial: Tensor) -> None:
        """Start the second stage."""
        sum_g, sum_gx, *coefficients = self.results
        if self.norm is None:
            add(partial, [sum_g, sum_gx])
        else:
            add_for(self.norm, partial, (sum_g, *coefficients))

    def of_nothing(self, like: Tensor) -> tuple[Tensor, ...]:
        """The results where there is nothing to sum; `like` has the batch norm's pixels."""
        sum_g, sum_gx, *coefficients = (t.zero_() for t in self.results)
        if self.norm is not None:
            coefficients = bn_coefficients.run(sum_g, torch.zeros_like(sum_g), *self.norm[:3], like)
        return sum_g, sum_gx, *coefficients


def sums(like: Tensor, c: int, norm: Norm | None) -> Sums:
    """Room for the results, of `c` channels on the device of `like`."""
    sizes = (c, c, 0, 0, 0) if norm is None else (c, 0, c, c, c)
    return Sums(tuple(like.new_empty(size, dtype=torch.float32) for size in sizes), norm)
