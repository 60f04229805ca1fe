"""`conv1x1_join` in Triton: one program per tile of the block's output, which is written once and nothing else is.

The loop over C (:func:`.gemm.multiply`) fills a float32 accumulator; scale, shift and the sample's factor make it y.
A projection's loop over C2 then fills a second one, which its own scale and shift make part of y: its output, and
that of the convolution, exist in registers only. The residual, ReLU, rounding and the mask follow in registers.

Bytes moved per pixel (16-bit): 2C read, 2*C2 with a projection, 2K with a residual; 2K written, K/8 with a mask. x is
read K/BLOCK_N times, but column tiles of the same rows run side by side, so the others come from L2; W comes from L2,
2C*BLOCK_N bytes a tile. An H100 (3.35 TB/s) would need 0.28 ms for 64 -> 256 channels at 256 x 56 x 56 with residual
and mask, were it to reach its bandwidth; not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import conv1x1_join as op
from ...ops import lazy
from ...ops.contract import Tensor, channels_last_strides, mask_shape
from . import checks, common, gemm
from .common import clamp_below_zero, first_row, load_factor, narrow, pack_bits, rows_in, widen
from .gemm import multiply, tile_of

NAME = op.OP.name
TWO_TERMS = "conv1x1_join two terms"  # its name in `configs` where y has a second term of as many registers


@triton.jit
def affine(t, scale_ptr, shift_ptr, cols, in_cols):
    """``scale*t + shift`` per column of a tile, in float32."""
    scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
    return tl.fma(t, scale, tl.load(shift_ptr + cols, mask=in_cols, other=0.0)[None, :])


@triton.jit(do_not_specialize=["M", "UNITS", "UNITS2", "UNITS_OUT", "W_OUT", "HW_OUT", "H2", "W2"])
def conv1x1_join_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr,  # [M, C], [K, C], [K], [K]
    x_scale_ptr, x_shift_ptr,  # [C], both or None
    residual_ptr, residual_scale_ptr, residual_shift_ptr,  # [M, K] or None; [K] and [K], both or None
    x2_ptr, weight2_ptr, scale2_ptr, shift2_ptr,  # [N*H2*W2, C2], [K, C2], [K], [K]; all or None
    factor_ptr,  # [N] or None
    out_ptr, mask_ptr,  # [M, K], [M, ceil(K / 8)] or None
    M, UNITS, UNITS2, UNITS_OUT, W_OUT, HW_OUT, H2, W2,
    DIV: tl.constexpr, DIV2: tl.constexpr, DIV_OUT: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C = UNITS * DIV
    K = UNITS_OUT * DIV_OUT
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(K, BLOCK_N))
    column = column_tile * BLOCK_N
    cols = column + tl.arange(0, BLOCK_N)
    in_cols = cols < K
    row = first_row(row_tile, 1, 0, BLOCK_M)
    in_rows = rows_in(row, M, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    y = multiply(x_ptr, row, in_rows, weight_ptr + column.to(tl.int64) * C, in_cols, x_scale_ptr, x_shift_ptr,
                 C, C, W_OUT, HW_OUT, H2, W2, 1, 1, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    y = affine(y, scale_ptr, shift_ptr, cols, in_cols)
    if factor_ptr is not None:
        y = y * load_factor(factor_ptr, row, in_rows, HW_OUT, BLOCK_M)
    offsets = rows[:, None] * K + cols[None, :]
    inside = in_rows[:, None] & in_cols[None, :]
    if residual_ptr is not None:
        residual = widen(tl.load(residual_ptr + row * K + offsets, mask=inside, other=0.0))
        if residual_scale_ptr is not None:
            residual = affine(residual, residual_scale_ptr, residual_shift_ptr, cols, in_cols)
        y = y + residual
    if x2_ptr is not None:
        C2 = UNITS2 * DIV2
        acc = multiply(x2_ptr, row, in_rows, weight2_ptr + column.to(tl.int64) * C2, in_cols, None, None,
                       C2, C2, W_OUT, HW_OUT, H2, W2, STRIDE_H, STRIDE_W, False,
                       PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        y = y + affine(acc, scale2_ptr, shift2_ptr, cols, in_cols)
    if RELU:
        y = clamp_below_zero(y)
    out = narrow(y, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * K + offsets, out, mask=inside)
    if mask_ptr is not None:
        # of the rounded output, as stock sees it; padding columns must give zero bits
        keep = ((widen(out) <= 0) == 0) & in_cols[None, :]
        width = tl.cdiv(K, 8)
        bytes_ = column // 8 + tl.arange(0, BLOCK_N // 8)
        there = in_rows[:, None] & (bytes_ < width)[None, :]
        where = row * width + rows[:, None] * width + bytes_[None, :]
        tl.store(mask_ptr + where, pack_bits(keep, BLOCK_M, BLOCK_N), mask=there)


def check_projection(out: Tensor, x2, weight2, scale2, shift2, stride2) -> None:
    """Raise RuntimeError where the second branch does not lead to `out`."""
    given = {"x2": x2, "weight2": weight2, "scale2": scale2, "shift2": shift2}
    missing = [name for name, t in given.items() if t is None]
    if 0 < len(missing) < len(given):
        got = [name for name in given if name not in missing]
        checks.fail(NAME, f"got {', '.join(got)} without {', '.join(missing)}; pass all four or none")
    if len(stride2) != 2 or min(stride2) < 1:
        checks.fail(NAME, f"stride2 is {list(stride2)}; pass two positive numbers")
    if x2 is None:
        return
    checks.data(NAME, "x2", x2)
    checks.device(NAME, "x2", x2, out)
    if x2.dtype != out.dtype:
        checks.fail(NAME, f"x2 is {x2.dtype} but x is {out.dtype}; pass one dtype")
    gemm.check_weight(NAME, "weight2", weight2, x2, out.shape[1], x2.shape[1])
    if lazy.strided_shape(x2, out.shape[1], stride2) != tuple(out.shape):
        checks.fail(NAME, f"a 1x1 convolution of x2 {list(x2.shape)} with stride2 {list(stride2)} does not give the "
                          f"output's shape {list(out.shape)}; pass an x2 of matching size")  # fmt: skip
    checks.pair(NAME, "scale2", scale2, "shift2", shift2, out)


def check_residual(out: Tensor, residual, residual_scale, residual_shift) -> None:
    """Raise RuntimeError where the residual does not fit `out`."""
    checks.same(NAME, "residual", residual, "the output", out)
    if residual_scale is not None and residual is None:
        checks.fail(NAME, "got residual_scale without residual; pass both")
    checks.pair(NAME, "residual_scale", residual_scale, "residual_shift", residual_shift, out)


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    stride2=(1, 1),
    sample_factor: Tensor | None = None,
    relu: bool = True,
    emit_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.conv1x1_join`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    checks.data(NAME, "x", x)
    gemm.check_weight(NAME, "weight", weight, x, None, x.shape[1])
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    out = x.new_empty_strided(shape, channels_last_strides(shape))
    checks.pair(NAME, "scale", scale, "shift", shift, out)
    checks.pair(NAME, "x_scale", x_scale, "x_shift", x_shift, x)
    check_residual(out, residual, residual_scale, residual_shift)
    check_projection(out, x2, weight2, scale2, shift2, stride2)
    checks.vector(NAME, "sample_factor", sample_factor, out, dim=0)
    mask = x.new_empty(mask_shape(out) if emit_mask else (0,), dtype=torch.uint8)
    if out.numel():
        branch = (x, weight, scale, shift, x_scale, x_shift)
        terms = (residual, residual_scale, residual_shift, x2, weight2, scale2, shift2, sample_factor)
        start(branch, terms, stride2, relu, out, mask if emit_mask else None)
    return out, mask


def start(branch: tuple, terms: tuple, stride2, relu: bool, out: Tensor, mask: Tensor | None) -> None:
    """Launch the kernel for arguments that were checked; `branch` and `terms` in the order of its arguments."""
    c, (n, k, h, w) = branch[0].shape[1], out.shape
    _, residual_scale, _, x2, *_ = terms
    c2, h2, w2 = (0, h, w) if x2 is None else x2.shape[1:]
    name = NAME if x2 is None and residual_scale is None else TWO_TERMS
    config = gemm.configuration(name, out, k, c + c2)
    (units, div), (units2, div2), (units_out, div_out) = map(gemm.split, (c, c2, k))
    sizes = (n * h * w, units, units2, units_out, w, h * w, h2, w2)
    meta = {"DIV": div, "DIV2": div2, "DIV_OUT": div_out, "STRIDE_H": stride2[0], "STRIDE_W": stride2[1]}
    meta |= {"RELU": relu, "PRECISION": gemm.precision(out.dtype)}
    meta |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    programs = common.cdiv(n * h * w, config.block_m) * common.cdiv(k, config.block_n)
    gemm.launch(conv1x1_join_kernel, programs, config, *branch, *terms, out, mask, *sizes, **meta)


KERNEL = common.register(op.OP, run)
