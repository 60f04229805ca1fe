"""Sums over rows whose partial sums are matrices: folding rows within a program, and adding the splits in order."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import narrow

FOLD = 16  # rows that a sum over rows keeps apart in registers, so that the loop crosses no threads
MERGE = {"BLOCK_S": 16, "BLOCK": 128}  # splits and elements of a merging tile, whatever the batch: one kernel each
#: Of one that goes along with a product: as a program of that it takes its place, so there are few, each with much to
#: load at once.
ALONG = {"MERGE_S": 2, "MERGE": 4096}


@triton.jit
def fold_rows(x, FOLDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum [BLOCK_M, BLOCK_C] to [FOLDED, BLOCK_C]: rows that a thread holds anyway."""
    return tl.sum(tl.reshape(x, (BLOCK_M // FOLDED, FOLDED, BLOCK_C)), axis=0)


@triton.jit
def sum_splits(ptr, where, there, splits, plane, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the elements `where` of all planes, in an order that depends on their number alone."""
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        inside = (split < splits)[:, None] & there[None, :]
        total += tl.load(ptr + split.to(tl.int64)[:, None] * plane + where[None, :], mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def merge_tile(partial_ptr, merged_ptr, tile, splits, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """Add the splits of a tile of `size` elements, and round it to what it is written to."""
    where = tile * BLOCK + tl.arange(0, BLOCK)
    there = where < size
    merged = sum_splits(partial_ptr, where, there, splits, size, BLOCK_S, BLOCK)
    tl.store(merged_ptr + where, narrow(merged, merged_ptr.dtype.element_ty), mask=there)
