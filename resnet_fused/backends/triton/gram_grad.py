"""`gram_grad` in Triton: two launches, no atomics; one where the input is narrow.

1. A program per BLOCK_M rows of W. First the sums along the rows: Wm, ``W centre`` and ``W * (P_d - sum_g m')``, which
   is grad_gamma without rstd: m is subtracted where digits cancel, in the elements, not in their sums. Then
   grad_weight, tile by tile, with ``W gram`` beside it. b and ``e = d0 - b*(W centre)`` go to scratch.
2. A program per tile of the upper triangle of `coupling`, looping over all K; it writes the tile and its mirror image.
   The tiles of the diagonal, one for each tile of columns, sum ``constant = sum_k e_k W[k, c]`` on the way.

Of few channels W and P are small: the programs of the second launch then find b and e again, each all of them, and
start beside those of the first. At K = 512, C = 128 ten programs read 0.4 MB each out of L2.

Every product is float32 times float32 on the ordinary units (`ieee`), as in :mod:`.gram_norm`. Bytes: the first reads W
and P twice, the second time out of L1 or L2, and `gram` (4 C^2, in L2) once a program, and writes grad_weight; the
second reads two columns of tiles of W a program, out of L2. At K = 2048, C = 512: 1.1 and 0.6 GFLOP in 128 and 136
programs. Not measured on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops import gram_grad as op
from ...ops.contract import Tensor
from . import checks, common, configs, gemm
from .common import first_row, narrow, rows_in, widen


@triton.jit
def row_sums(
    weight_ptr, product_ptr,  # at the program's first row
    total_ptr, centre_ptr, sum_g, per_pixel, in_rows, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``rowsum(W * (P - sum_g (centre + m)'))``, ``W m`` and ``W centre``."""
    offsets = tl.arange(0, BLOCK_M)[:, None] * C
    wp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wm = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.range(0, C, BLOCK_N):
        cols = j + tl.arange(0, BLOCK_N)
        in_cols = cols < C
        inside = in_rows[:, None] & in_cols[None, :]
        w = widen(tl.load(weight_ptr + offsets + cols[None, :], mask=inside, other=0.0))
        p = tl.load(product_ptr + offsets + cols[None, :], mask=inside, other=0.0)
        centre = tl.load(centre_ptr + cols, mask=in_cols, other=0.0)[None, :]
        m = (tl.load(total_ptr + cols, mask=in_cols, other=0.0) * per_pixel)[None, :]
        p = tl.fma(-sum_g[:, None], m, tl.fma(-sum_g[:, None], centre, p))
        wp = tl.fma(w, p, wp)
        wm = tl.fma(w, m, wm)
        wc = tl.fma(w, centre, wc)
    return tl.sum(wp, axis=1), tl.sum(wm, axis=1), tl.sum(wc, axis=1)


@triton.jit
def coefficients(
    weight_ptr, product_ptr,  # at the first of BLOCK_M rows
    total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr, rows, per_pixel, in_rows, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the rows `rows`: grad_gamma, b, d0 and e; and sum_g and scale."""
    sum_g = tl.load(sum_g_ptr + rows, mask=in_rows, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=in_rows, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
    wp, wm, wc = row_sums(weight_ptr, product_ptr, total_ptr, centre_ptr, sum_g, per_pixel, in_rows, C,
                          BLOCK_M, BLOCK_N)  # fmt: skip
    grad_gamma = rstd * wp
    unit = scale * per_pixel
    b = -unit * (rstd * grad_gamma)
    d0 = unit * tl.fma(rstd * grad_gamma, wm, -sum_g)
    return grad_gamma, b, d0, tl.fma(-b, wc, d0), sum_g, scale


@triton.jit
def write_rows(
    program, weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr,
    grad_weight_ptr, grad_gamma_ptr, scratch_ptr, M, K, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the weight's gradient and of gamma's; b and e to scratch, if there is any."""
    pitch = C.to(tl.int64)
    per_pixel = tl.div_rn(1.0, M.to(tl.float32))
    row = first_row(program, 1, 0, BLOCK_M)
    in_rows = rows_in(row, K, BLOCK_M)
    rows = row + tl.arange(0, BLOCK_M)
    offsets = tl.arange(0, BLOCK_M)[:, None] * C
    weight_ptr += row * C
    product_ptr += row * C
    grad_gamma, b, d0, e, sum_g, scale = coefficients(
        weight_ptr, product_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr, rows, per_pixel, in_rows, C,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tl.store(grad_gamma_ptr + rows, grad_gamma, mask=in_rows)
    if scratch_ptr is not None:
        tl.store(scratch_ptr + rows, b, mask=in_rows)
        tl.store(scratch_ptr + K + rows, e, mask=in_rows)
    for j in tl.range(0, C, BLOCK_N):
        cols = j + tl.arange(0, BLOCK_N)
        in_cols = cols < C
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.range(0, C, BLOCK_K):
            depth = i + tl.arange(0, BLOCK_K)
            in_depth = depth < C
            w = tl.load(weight_ptr + offsets + depth[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
            where = tl.arange(0, BLOCK_K)[:, None] * C + cols[None, :]
            gram = tl.load(gram_ptr + i * pitch + where, mask=in_depth[:, None] & in_cols[None, :], other=0.0)
            acc = gemm.dot(widen(w), gram, acc, "ieee")
        inside = in_rows[:, None] & in_cols[None, :]
        p = tl.load(product_ptr + offsets + cols[None, :], mask=inside, other=0.0)
        centre = tl.load(centre_ptr + cols, mask=in_cols, other=0.0)[None, :]
        total = tl.load(total_ptr + cols, mask=in_cols, other=0.0)[None, :]
        p = tl.fma(-sum_g[:, None], centre, p)
        grad = tl.fma(scale[:, None], p, tl.fma(b[:, None], acc, d0[:, None] * total))
        grad = narrow(grad, grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + row * C + offsets + cols[None, :], grad, mask=inside)


@triton.jit
def upper_tile(program, tiles):
    """Row and column of a tile of the upper triangle; two rows of it, p and one from its end, fill one of `width`."""
    width = tiles + 1 - tiles % 2
    p, q = program // width, program % width
    first = q < tiles - p
    row = tl.where(first, p, tiles - 1 + tiles % 2 - p)
    return row, row + tl.where(first, q, q - (tiles - p))


@triton.jit
def write_coupling(
    tile, weight_ptr, product_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr,
    scratch_ptr,  # or None: b and e are found again
    coupling_ptr, constant_ptr, M, K, C,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the upper triangle of the coupling and its mirror image, on the diagonal a piece of the constant."""
    pitch = C.to(tl.int64)
    left, right = upper_tile(tile, tl.cdiv(C, BLOCK_N))
    rows = left * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = right * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < C, cols < C
    offsets = tl.arange(0, BLOCK_K)[:, None] * C
    acc = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    constant = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        in_depth = depth < K
        start = weight_ptr + k * pitch
        w_left = tl.load(start + offsets + rows[None, :], mask=in_depth[:, None] & in_rows[None, :], other=0.0)
        w_right = tl.load(start + offsets + cols[None, :], mask=in_depth[:, None] & in_cols[None, :], other=0.0)
        if scratch_ptr is not None:
            b = tl.load(scratch_ptr + depth, mask=in_depth, other=0.0)
            e = tl.load(scratch_ptr + K + depth, mask=in_depth, other=0.0)
        else:
            per_pixel = tl.div_rn(1.0, M.to(tl.float32))
            _, b, _, e, _, _ = coefficients(
                start, product_ptr + k * pitch, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr, depth, per_pixel,
                in_depth, C, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        constant = tl.fma(e[:, None], widen(w_right), constant)
        acc = gemm.dot(tl.trans(widen(w_left)), b[:, None] * widen(w_right), acc, "ieee")
    rounded = narrow(acc, coupling_ptr.dtype.element_ty)
    inside = in_rows[:, None] & in_cols[None, :]  # the diagonal's own lower half is rounded otherwise: left out
    upper, mirror = rows[:, None] <= cols[None, :], rows[:, None] < cols[None, :]
    tl.store(coupling_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :], rounded, mask=inside & upper)
    tl.store(coupling_ptr + cols.to(tl.int64)[None, :] * C + rows[:, None], rounded, mask=inside & mirror)
    if left == right:
        tl.store(constant_ptr + cols, tl.sum(constant, axis=0), mask=in_cols)


@triton.jit(do_not_specialize=["M", "K", "UNITS"])
def gram_grad_rows_kernel(
    weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr,  # [K, C], [K, C], [C, C], [C], [C]
    sum_g_ptr, scale_ptr, rstd_ptr,  # [K] each
    grad_weight_ptr, grad_gamma_ptr,  # [K, C], [K]
    scratch_ptr,  # [2, K]: b, e
    M, K, UNITS,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    write_rows(tl.program_id(0), weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr,
               rstd_ptr, grad_weight_ptr, grad_gamma_ptr, scratch_ptr, M, K, UNITS * DIV,
               BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=["K", "UNITS"])
def gram_grad_coupling_kernel(
    weight_ptr, scratch_ptr,  # [K, C], [2, K]: b, e
    coupling_ptr, constant_ptr,  # [C, C], [C]
    K, UNITS,
    DIV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    write_coupling(tl.program_id(0), weight_ptr, None, None, None, None, None, None, scratch_ptr,
                   coupling_ptr, constant_ptr, None, K, UNITS * DIV, BLOCK_N, BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=["M", "K", "UNITS"])
def gram_grad_narrow_kernel(
    weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr,  # [K, C], [K, C], [C, C], [C], [C]
    sum_g_ptr, scale_ptr, rstd_ptr,  # [K] each
    grad_weight_ptr, grad_gamma_ptr, coupling_ptr, constant_ptr,  # [K, C], [K], [C, C], [C]
    M, K, UNITS,
    DIV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SQUARE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row_programs = tl.cdiv(K, BLOCK_M)
    if program < row_programs:
        write_rows(program, weight_ptr, product_ptr, gram_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr, rstd_ptr,
                   grad_weight_ptr, grad_gamma_ptr, None, M, K, UNITS * DIV, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        write_coupling(program - row_programs, weight_ptr, product_ptr, total_ptr, centre_ptr, sum_g_ptr, scale_ptr,
                       rstd_ptr, None, coupling_ptr, constant_ptr, M, K, UNITS * DIV, SQUARE, DEPTH)  # fmt: skip


def check(weight, product, gram, total, centre, sum_g, scale, rstd, a) -> None:
    """Raise RuntimeError on wrong shapes, dtypes, devices or layouts."""
    name = "gram_grad"
    checks.gram_arguments(name, weight, gram, total, centre, a)
    k, c = weight.shape[:2]
    checks.statistics(name, "product", product, (k, c), weight)
    for vector_name, vector in (("sum_g", sum_g), ("scale", scale), ("rstd", rstd)):
        checks.statistics(name, vector_name, vector, (k,), weight)


def run(
    weight: Tensor,
    product: Tensor,
    gram: Tensor,
    total: Tensor,
    centre: Tensor,
    sum_g: Tensor,
    scale: Tensor,
    rstd: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.gram_grad`. Raises RuntimeError on arguments that do not fit."""
    check(weight, product, gram, total, centre, sum_g, scale, rstd, a)
    k, c = weight.shape[:2]
    pixels = a.shape[0] * a.shape[2] * a.shape[3]
    if pixels == 0 or weight.numel() == 0:
        return weight.new_zeros(k, c), scale.new_zeros(k), weight.new_zeros(c, c, 1, 1), scale.new_zeros(c)
    grad_weight, grad_gamma = weight.new_empty(k, c), scale.new_empty(k)
    coupling, constant = weight.new_empty(c, c, 1, 1), scale.new_empty(c)
    units, div = gemm.split(c)
    sizes = {"K": k, "UNITS": units, "DIV": div}
    card = configs.capability(weight.device), weight.element_size()
    config, square = configs.config("gram_grad", *card, c, c), configs.config("gram_grad coupling", *card, c, k)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    given = (weight, product, gram, total, centre, sum_g, scale, rstd, grad_weight, grad_gamma)
    programs, tiles = common.cdiv(k, config.block_m), common.cdiv(c, square.block_n)
    tiles = tiles * (tiles + 1) // 2
    if c <= op.NARROW:
        blocks |= {"SQUARE": square.block_n, "DEPTH": square.block_k}
        kernel = gram_grad_narrow_kernel
        gemm.launch(kernel, programs + tiles, config, *given, coupling, constant, M=pixels, **sizes, **blocks)
        return grad_weight, grad_gamma, coupling, constant
    scratch = scale.new_empty(2, k)
    gemm.launch(gram_grad_rows_kernel, programs, config, *given, scratch, M=pixels, **sizes, **blocks)
    blocks = {"BLOCK_N": square.block_n, "BLOCK_K": square.block_k}
    gemm.launch(gram_grad_coupling_kernel, tiles, square, weight, scratch, coupling, constant, **sizes, **blocks)
    return grad_weight, grad_gamma, coupling, constant


KERNEL = common.register(op.OP, run)
