"""`conv1x1_wgrad` in Triton: one program per tile of the weight and split of the rows; a second launch adds the splits.
Of a Gram join that launch goes on to what :mod:`.gram_grad` begins with, and that one's second is the third.

A program walks over its rows, the contraction, in tiles of BLOCK_M: it loads ``dz`` [BLOCK_M, BLOCK_K] and ``x^``
[BLOCK_M, BLOCK_C], applies both in registers and adds ``dz' x^``. The programs of the first column tile also add up dz.
Programs of one split follow each other, so that what they read again comes from L2. No atomics: each split stores a
partial gradient of its own, and the splits are added in order.

Bytes moved per row (16-bit): 2 K for g, 2 K for z where dz has a term in it, K/8 for bits, 2 C for x, from memory once
and from L2 once per tile of the other operand. Partial results cost 8 K C bytes a split, mostly within L2. At 56 x 56
and batch 64 with K = 256, C = 64 that is 8.6 MB for 66 splits, beside 230 MB of reads (0.07 ms of an H100's bandwidth);
not measured.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...ops import conv1x1_wgrad as op
from ...ops import lazy
from ...ops.contract import Tensor
from .. import cards
from . import checks, common, gemm, gram_grad, splits
from .common import first_row, load_factor, rows_in, widen_pairs
from .gemm import apply_activation_in, dot, tile_of
from .gram_coefficients import Join
from .lazy_tiles import load_gradient, load_row
from .split_sums import FOLD, MERGE, fold_rows, merge_tile


@triton.jit(do_not_specialize=["M", "UNITS_K", "UNITS_C", "TILES", "H", "W", "W_OUT", "HW_OUT", "STRIDE_H", "STRIDE_W"])
def conv1x1_wgrad_kernel(
    g_ptr, x_ptr, z_ptr, mask_ptr,  # [M, K], [N*H*W, C], [M, K] or None, [M, ceil(K / 8)] or None
    a_ptr, b_ptr, d_ptr, scale_ptr, shift_ptr, factor_ptr,  # [K] five times, [N], each or None
    x_scale_ptr, x_shift_ptr,  # [C], both or None
    weight_ptr, sum_ptr,  # [splits, K, C], [splits, K]
    M, UNITS_K, UNITS_C, TILES, H, W, W_OUT, HW_OUT, STRIDE_H, STRIDE_W,
    STRIDED: tl.constexpr, DIV_K: tl.constexpr, DIV_C: tl.constexpr, PRECISION: tl.constexpr,
    FOLDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    K = UNITS_K * DIV_K
    C = UNITS_C * DIV_C
    split, tile = tile_of(tl.program_id(0), tl.cdiv(K, BLOCK_K) * tl.cdiv(C, BLOCK_C))
    k, c = tile_of(tile, tl.cdiv(C, BLOCK_C))
    k, c = k * BLOCK_K, c * BLOCK_C
    cols = c + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    a = load_row(a_ptr, k, K, BLOCK_K) if a_ptr is not None else None
    b = load_row(b_ptr, k, K, BLOCK_K) if b_ptr is not None else None
    d = load_row(d_ptr, k, K, BLOCK_K) if d_ptr is not None else None
    scale = load_row(scale_ptr, k, K, BLOCK_K) if scale_ptr is not None else None
    shift = load_row(shift_ptr, k, K, BLOCK_K) if shift_ptr is not None else None
    x_scale = load_row(x_scale_ptr, c, C, BLOCK_C) if x_scale_ptr is not None else None
    x_shift = load_row(x_shift_ptr, c, C, BLOCK_C) if x_shift_ptr is not None else None
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    total = tl.zeros((FOLDED, BLOCK_K), tl.float32)
    for i in tl.range(0, TILES):
        row = first_row(split, TILES, i, BLOCK_M)
        in_rows = rows_in(row, M, BLOCK_M)
        if factor_ptr is not None:
            factor = load_factor(factor_ptr, row, in_rows, HW_OUT, BLOCK_M)
        else:
            factor = None
        dz = load_gradient(g_ptr, z_ptr, mask_ptr, a, b, d, scale, shift, factor,
                           row, k, in_rows, K, BLOCK_M, BLOCK_K)  # fmt: skip
        inside = in_rows[:, None] & in_cols[None, :]
        if STRIDED:
            x_rows = gemm.read_rows(row, W_OUT, HW_OUT, H, W, STRIDE_H, STRIDE_W, BLOCK_M)
            x = tl.load(x_ptr + x_rows[:, None] * C + cols[None, :], mask=inside, other=0.0)
        else:
            offsets = tl.arange(0, BLOCK_M)[:, None] * C + cols[None, :]
            x = tl.load(x_ptr + row * C + offsets, mask=inside, other=0.0)
        if x_scale_ptr is not None:  # relu(shift) of a row that does not exist may be infinite, and times zero is NaN
            x = apply_activation_in(in_rows, x, x_scale, x_shift, x_ptr.dtype.element_ty)
        acc = dot(tl.trans(dz), x, acc, PRECISION)
        if c == 0:
            total += fold_rows(widen_pairs(dz), FOLDED, BLOCK_M, BLOCK_K)
    outs = k + tl.arange(0, BLOCK_K)
    in_outs = outs < K
    where = weight_ptr + (split.to(tl.int64) * K + k) * C
    offsets = tl.arange(0, BLOCK_K)[:, None] * C + cols[None, :]
    tl.store(where + offsets, acc, mask=in_outs[:, None] & in_cols[None, :])
    if c == 0:
        tl.store(sum_ptr + split.to(tl.int64) * K + outs, tl.sum(total, axis=0), mask=in_outs)


@triton.jit(do_not_specialize=["splits", "UNITS", "K", "weight_tiles"])
def conv1x1_wgrad_merge_kernel(
    weight_partial_ptr, sum_partial_ptr,  # [splits, K*C], [splits, K]
    weight_ptr, sum_ptr,  # [K*C], [K]
    splits, UNITS, K, weight_tiles,
    DIV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < weight_tiles:
        merge_tile(weight_partial_ptr, weight_ptr, tile, splits, UNITS * DIV, BLOCK_S, BLOCK)
    else:
        merge_tile(sum_partial_ptr, sum_ptr, tile - weight_tiles, splits, K, BLOCK_S, BLOCK)


def check(g: Tensor, x: Tensor, gradient: tuple, x_scale, x_shift, stride) -> None:
    """Raise RuntimeError on wrong shapes, dtypes, devices, layouts, or too few arguments."""
    name = op.OP.name
    checks.lazy_gradient(name, g, *gradient)
    checks.data(name, "x", x)
    checks.device(name, "x", x, g)
    if x.dtype != g.dtype:
        checks.fail(name, f"x is {x.dtype} but g is {g.dtype}; pass one dtype")
    checks.stride(name, "stride", stride)
    if lazy.strided_shape(x, g.shape[1], stride) != tuple(g.shape):
        checks.fail(name, f"a 1x1 convolution of x {list(x.shape)} with stride {list(stride)} does not give "
                          f"{list(g.shape)}; pass the gradient at its output")  # fmt: skip
    checks.pair(name, "x_scale", x_scale, "x_shift", x_shift, x)


def check_join(g: Tensor, x: Tensor, join: Join) -> None:
    """Raise RuntimeError where the Gram join's matrices do not fit, or are given in part."""
    name, lacking = op.OP.name, [field for field, t in join._asdict().items() if t is None]
    if len(lacking) == len(join):
        return
    if lacking:
        checks.fail(name, f"got a Gram join without {lacking[0]}; pass all of {', '.join(Join._fields)}, or none")
    gemm.check_weight(name, "join_weight", join.join_weight, g, g.shape[1], x.shape[1])
    checks.gram_arguments(name, *join[:4], g)
    for vector_name in ("join_scale", "join_rstd"):
        checks.statistics(name, vector_name, getattr(join, vector_name), (g.shape[1],), join.join_weight)


def start(g, x, gradient, x_scale, x_shift, stride, results=None) -> tuple[Tensor, Tensor]:
    """Launch the product: its partial sums ``[splits, K, C]`` and ``[splits, K]``.

    Args:
        gradient: z, mask, a, b, d, scale, shift, sample_factor.
        results: written to in their place, and returned, where there is one split.
    """
    (n, k, h, w), c = g.shape, x.shape[1]
    config = gemm.configuration(op.OP.name, g, k, c)
    tiles = common.cdiv(k, config.block_n) * common.cdiv(c, config.block_k)
    rows = n * h * w
    sizes = (rows, tiles, (k + c) * g.element_size(), 8 * k * (c + 1), config.block_m)
    split = splits.choose(*sizes, cards.of(g.device).sms, splits.resident(config))
    partial = results
    if results is None or split.splits > 1:
        partial = tuple(g.new_empty((split.splits, *size), dtype=torch.float32) for size in ((k, c), (k,)))
    (units_k, div_k), (units_c, div_c) = gemm.split(k), gemm.split(c)
    sizes = {"M": rows, "UNITS_K": units_k, "UNITS_C": units_c, "DIV_K": div_k, "DIV_C": div_c}
    sizes["TILES"] = split.row_tiles
    geometry = {"H": x.shape[2], "W": x.shape[3], "W_OUT": w, "HW_OUT": h * w, "STRIDE_H": stride[0],
                "STRIDE_W": stride[1], "STRIDED": tuple(stride) != (1, 1)}  # fmt: skip
    blocks = {"BLOCK_M": config.block_m, "BLOCK_K": config.block_n, "BLOCK_C": config.block_k}
    blocks |= {"FOLDED": min(FOLD, config.block_m), "PRECISION": gemm.precision(g.dtype)}
    gemm.launch(conv1x1_wgrad_kernel, split.splits * tiles, config, g, x, *gradient, x_scale, x_shift, *partial,
                **sizes, **geometry, **blocks)  # fmt: skip
    return partial


def run(
    g: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    stride=(1, 1),
    rounded: bool = False,
    join_weight: Tensor | None = None,
    gram: Tensor | None = None,
    total: Tensor | None = None,
    centre: Tensor | None = None,
    join_scale: Tensor | None = None,
    join_rstd: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See :mod:`resnet_fused.ops.conv1x1_wgrad`. Raises RuntimeError on arguments that do not fit."""
    check(g, x, (mask, z, a, b, d, scale, shift, sample_factor), x_scale, x_shift, stride)
    join, joined = Join(join_weight, gram, total, centre, join_scale, join_rstd), join_weight is not None
    check_join(g, x, join)
    (n, k, h, w), c = g.shape, x.shape[1]
    nothing = g.numel() == 0 or c == 0
    vector = functools.partial(g.new_zeros if nothing else g.new_empty, dtype=torch.float32)
    sum_g = vector(k)
    if joined:
        results = gram_grad.results(join_weight, nothing)
    else:
        results = (vector((k, c), dtype=x.dtype if rounded else torch.float32), *gram_grad.no_results(g))
    grad_weight, *others = results
    if nothing:
        return grad_weight, sum_g, *others
    recompute = (scale, shift) if mask is None else (None, None)
    used_z = z if b is not None or recompute[0] is not None else None
    gradient = (used_z, mask, a, b, d, *recompute, sample_factor)
    whole = None if joined or rounded else (grad_weight, sum_g)  # one binary, whatever the number of splits
    partial = start(g, x, gradient, x_scale, x_shift, stride, whole)
    if joined:
        gram_grad.after(partial, join, n * h * w, sum_g, results)
    elif partial is not whole:
        merge(partial, (grad_weight, sum_g))
    return grad_weight, sum_g, *others


def merge(partial: tuple[Tensor, Tensor], results: tuple[Tensor, Tensor]) -> None:
    """Add the splits of both results in one launch."""
    count, k, c = partial[0].shape
    weight_tiles, sum_tiles = common.cdiv(k * c, MERGE["BLOCK"]), common.cdiv(k, MERGE["BLOCK"])
    units, div = gemm.split(k * c)
    sizes = {"splits": count, "UNITS": units, "K": k, "weight_tiles": weight_tiles, "DIV": div}
    kernel = conv1x1_wgrad_merge_kernel
    common.start(kernel, weight_tiles + sum_tiles, partial[0], partial[1], *results, **sizes, **MERGE)


KERNEL = common.register(op.OP, run)
