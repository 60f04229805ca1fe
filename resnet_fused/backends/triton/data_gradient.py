"""What the data gradients of 1x1 convolutions share, alone or beside the weight gradient.

Products with a matrix as it lies, what is added at the end of a tile, the check of that, and room for its sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops.contract import Tensor, mask_shape
from . import checks, chunk_sums, common, gemm
from .chunk_sums import Norm, Sums
from .common import unpack_bits, widen
from .gemm import dot

# Device side ----------------------------------------------------------------------------------------------------


@triton.jit
def load_matrix(ptr, k, column, K, C, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of a row-major matrix [K, C], zero where it does not exist. Matrices are small: offsets are int32."""
    rows = k + tl.arange(0, BLOCK_K)
    cols = column + tl.arange(0, BLOCK_N)
    inside = (rows < K)[:, None] & (cols < C)[None, :]
    return tl.load(ptr + rows[:, None] * C + cols[None, :], mask=inside, other=0.0)


@triton.jit
def residual_rows(row, W, HW, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of the residual that belong to the rows of a tile (int64), and which of those have one."""
    if STRIDE_H == 1 and STRIDE_W == 1:
        rows = row + tl.arange(0, BLOCK_M)
        has = tl.full((BLOCK_M,), 1, tl.int1)
    else:
        sample = row // HW
        within = (row - sample * HW).to(tl.int32) + tl.arange(0, BLOCK_M)
        samples = within // HW  # int32 from here on: a tile reaches BLOCK_M rows beyond an image
        pixel = within - samples * HW
        h = pixel // W
        w = pixel - h * W
        width = tl.cdiv(W, STRIDE_W)
        image = tl.cdiv(HW // W, STRIDE_H) * width
        rows = (sample + samples) * image + (h // STRIDE_H * width + w // STRIDE_W)
        has = (h % STRIDE_H == 0) & (w % STRIDE_W == 0)
    return rows, has


@triton.jit
def load_residual(ptr, mask_ptr, rows, there, column, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of the residual in float32, zero where its bit is 0 (also where it is NaN) and in rows without one."""
    cols = column + tl.arange(0, BLOCK_N)
    inside = there[:, None] & (cols < C)[None, :]
    r = widen(tl.load(ptr + rows[:, None] * C + cols[None, :], mask=inside, other=0.0))
    if mask_ptr is not None:
        width = tl.cdiv(C, 8)
        bytes_ = column // 8 + tl.arange(0, BLOCK_N // 8)
        inside = there[:, None] & (bytes_ < width)[None, :]
        packed = tl.load(mask_ptr + rows[:, None] * width + bytes_[None, :], mask=inside, other=0)
        r = tl.where(unpack_bits(packed, BLOCK_M, BLOCK_N), r, 0.0)
    return r


@triton.jit
def add_product(acc, tile, matrix, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """``acc + tile matrix``; with TRANSPOSED of its transpose, which is what `acc` then holds."""
    if TRANSPOSED:
        return dot(tl.trans(matrix), tl.trans(tile), acc, PRECISION)
    else:
        return dot(tile, matrix, acc, PRECISION)


# Host side ------------------------------------------------------------------------------------------------------


def check_additions(
    op, grad_x, x, x_stride, x_scale, x_shift, coupling, constant, residual, residual_mask, stride, masked
) -> None:
    """Raise RuntimeError on what is added to the product, or asked of it, where it does not fit `grad_x`.

    `masked`: whether grad_x is taken through the ReLU before x.
    """
    checks.stride(op, "x_stride", x_stride)
    checks.same(op, "x", x, "grad_x", grad_x, x_stride)
    checks.pair(op, "x_scale", x_scale, "x_shift", x_shift, grad_x)
    checks.vector(op, "constant", constant, grad_x)
    c = grad_x.shape[1]
    if coupling is not None:
        gemm.check_weight(op, "coupling", coupling, grad_x, c, c)
    if x is None and (coupling is not None or x_scale is not None):
        checks.fail(op, f"got {'x_scale' if coupling is None else 'coupling'} without x; pass x too")
    if residual is None:
        if residual_mask is not None:
            checks.fail(op, "got residual_mask without residual; pass both")
        return
    if masked:
        checks.fail(op, "got residual with x_scale, under which nothing is added; pass one of them")
    checks.stride(op, "residual_stride", stride)
    n, _, h, w = grad_x.shape
    shape = (n, c, common.cdiv(h, stride[0]), common.cdiv(w, stride[1]))
    checks.same(op, "residual", residual, "grad_x at residual_stride", grad_x.new_empty_strided(shape, (0, 0, 0, 0)))
    if residual_mask is not None:
        checks.device(op, "residual_mask", residual_mask, residual)
        wanted = list(mask_shape(residual))
        given = list(residual_mask.shape)
        if residual_mask.dtype != torch.uint8 or given != wanted or not residual_mask.is_contiguous():
            checks.fail(op, f"residual_mask is {residual_mask.dtype} of shape {given}; pass the contiguous uint8 "
                              f"{wanted} mask that a forward emitted for residual's shape")  # fmt: skip


def summed(op: str, grad_x: Tensor, x, x_scale, x_mean, x_rstd, there: bool) -> Sums:
    """Room for the sums of grad_x, empty unless `there`, and for the coefficients where x_rstd is given."""
    checks.vector(op, "x_rstd", x_rstd, grad_x)
    if x_rstd is not None and not there:
        checks.fail(op, "got x_rstd without x_scale and x_mean; pass them too")
    norm = None if x_rstd is None else Norm(x_mean, x_rstd, x_scale, x.shape[0] * x.shape[2] * x.shape[3])
    return chunk_sums.sums(grad_x, grad_x.shape[1] if there else 0, norm)
