"""Tiles of lazy gradients and lazy activations, applied on load: what `conv1x1_dgrad` and `conv1x1_wgrad` share.

A tile is BLOCK_M consecutive rows (pixels) and BLOCK_K channels, from an int64 row and an int32 column on; of what a
strided convolution reads, the rows that `read_rows` finds. An absent term is None at compile time and costs nothing.
Per element of ``dz`` (16-bit): 2 bytes read for g, 2 for z where a term needs it, 1/8 for the bits; the vectors, 4
bytes per channel and tile each, come out of L1 or L2.

A kernel calls :func:`load_row` for each vector that is there, then :func:`load_gradient`; for a product over rows,
``tl.trans`` it. No function here returns None: Triton 3.6 has no such functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import narrow_pairs, widen_pairs
from .gemm import apply_activation
from .norm_add_relu_backward import load_bits


@triton.jit
def load_row(ptr, column, C, BLOCK_C: tl.constexpr):
    """Part of a per-channel vector as a row [1, BLOCK_C], zero for channels that do not exist."""
    cols = column + tl.arange(0, BLOCK_C)
    return tl.load(ptr + cols, mask=cols < C, other=0.0)[None, :]


@triton.jit
def load_tile(ptr, row, column, in_rows, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of [M, C] as it is, zero where it does not exist."""
    cols = column + tl.arange(0, BLOCK_C)
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    return tl.load(ptr + row * C + offsets, mask=in_rows[:, None] & (cols < C)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, values, row, column, in_rows, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write a tile of [M, C], as far as it exists."""
    cols = column + tl.arange(0, BLOCK_C)
    offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
    tl.store(ptr + row * C + offsets, values, mask=in_rows[:, None] & (cols < C)[None, :])


@triton.jit
def load_gradient(
    g_ptr, z_ptr, mask_ptr,  # [M, K], [M, K] or None, [M, ceil(K / 8)] uint8 or None
    a, b, d, scale, shift,  # rows of `load_row`, each or None
    factor,  # column [BLOCK_M, 1] of `common.load_factor`, or None
    row, column, in_rows, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ZERO_ROWS: tl.constexpr = True,
):  # fmt: skip
    """``dz = factor*a*keep*g + (b*z + d)``, rounded to the dtype of g; zero in rows and columns that do not exist.

    `keep` is the bit of the mask, else ``not (scale*z + shift <= 0)`` where scale is given. Pass z with b or scale.
    Without ZERO_ROWS rows that do not exist hold d: for products whose rows are rows of dz, and masked where they go.
    """
    g = load_tile(g_ptr, row, column, in_rows, K, BLOCK_M, BLOCK_K)
    if z_ptr is None and mask_ptr is None and a is None and factor is None:
        return g
    elif z_ptr is None and a is None and factor is None:  # bits select among 16 bits as well as among 32
        return tl.where(load_bits(mask_ptr, row, column, in_rows, K, BLOCK_M, BLOCK_K), g, 0.0)
    else:
        dz = widen_pairs(g)
        if z_ptr is not None:
            z = widen_pairs(load_tile(z_ptr, row, column, in_rows, K, BLOCK_M, BLOCK_K))
        if mask_ptr is not None:
            dz = tl.where(load_bits(mask_ptr, row, column, in_rows, K, BLOCK_M, BLOCK_K), dz, 0.0)
        elif scale is not None:
            dz = tl.where(tl.fma(z, scale, shift) <= 0, 0.0, dz)
        if factor is not None:
            dz = dz * factor
        if a is not None:
            dz = dz * a
        if b is not None:  # d would show in rows that do not exist; in such columns it is zero
            dz = dz + tl.fma(z, b, d)
            if ZERO_ROWS:
                dz = tl.where(in_rows[:, None], dz, 0.0)
        return narrow_pairs(dz, g_ptr.dtype.element_ty)


@triton.jit
def read_gradient(
    g_ptr, z_ptr, mask_ptr, a_ptr, b_ptr, d_ptr, scale_ptr, shift_ptr, factor,
    row, column, in_rows, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ZERO_ROWS: tl.constexpr = True,
):  # fmt: skip
    """As `load_gradient`, and its vectors ([K] each, or None) with it: where a loop over columns needs others."""
    a = load_row(a_ptr, column, K, BLOCK_K) if a_ptr is not None else None
    b = load_row(b_ptr, column, K, BLOCK_K) if b_ptr is not None else None
    d = load_row(d_ptr, column, K, BLOCK_K) if d_ptr is not None else None
    scale = load_row(scale_ptr, column, K, BLOCK_K) if scale_ptr is not None else None
    shift = load_row(shift_ptr, column, K, BLOCK_K) if shift_ptr is not None else None
    return load_gradient(g_ptr, z_ptr, mask_ptr, a, b, d, scale, shift, factor,
                         row, column, in_rows, K, BLOCK_M, BLOCK_K, ZERO_ROWS)  # fmt: skip


@triton.jit
def load_pixels(ptr, row, rows, column, in_rows, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """As `load_tile`; of the `rows` of `read_rows` under a stride, else None."""
    if rows is None:
        return load_tile(ptr, row, column, in_rows, C, BLOCK_M, BLOCK_C)
    else:
        cols = column + tl.arange(0, BLOCK_C)
        inside = in_rows[:, None] & (cols < C)[None, :]
        return tl.load(ptr + (rows[:, None] * C + cols[None, :]), mask=inside, other=0.0)


@triton.jit
def load_activation(x_ptr, scale, shift, row, rows, column, in_rows, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """``x^`` of `load_pixels`, rounded to the dtype of x; scale and shift: rows of `load_row`, or None for plain x.

    Columns that do not exist are zero; rows that do not exist are ``relu(shift)``: whoever sums over rows masks them.
    """
    x = load_pixels(x_ptr, row, rows, column, in_rows, C, BLOCK_M, BLOCK_C)
    if scale is None:
        return x
    else:
        return apply_activation(x, scale, shift, x_ptr.dtype.element_ty)
