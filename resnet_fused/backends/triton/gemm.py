"""What the 1x1 kernels share: products of tiles, operands that are applied on load, and launches.

Every product is over rows of channels_last tensors. The rows of a tile begin at an int64 scalar; offsets within a tile
are int32 where rows follow each other, int64 where a stride jumps over pixels (`read_rows`). Programs that share rows
follow each other (`tile_of`), so that what they read again comes from L2. A channel count C arrives as
``UNITS * DIV``, as in :mod:`.common`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops.contract import Tensor
from .. import tf32
from . import checks, common, configs
from .common import _INTERPRETING, narrow, narrow_pairs, widen, widen_pairs
from .configs import Config

# Host side ------------------------------------------------------------------------------------------------------


def split(channels: int) -> tuple[int, int]:
    """A channel count as ``(UNITS, DIV)``: DIV is its largest power of two up to 16, a constexpr."""
    div = max(1, min(channels & -channels, 16))
    return channels // div, div


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: TF32 only where PyTorch's setting for convolutions allows it."""
    return "tf32" if dtype == torch.float32 and tf32.allowed() else "ieee"


def configuration(op: str, x: Tensor, columns: int, depth: int) -> Config:
    """The tile of a product for activations like `x`; ``"<op> ieee"`` where float32 takes the ordinary units."""
    ordinary = x.dtype == torch.float32 and precision(x.dtype) == "ieee"
    name = f"{op.split()[0]} ieee" if ordinary else op
    return configs.config(name, configs.capability(x.device), x.element_size(), columns, depth)


def launch(kernel, programs: int, config: Config, x: Tensor, *args, **meta) -> None:
    """Start `programs` programs of `kernel`, whose first argument is `x`, on the device of `x`."""
    meta |= {"warps": config.warps, "stages": config.stages, "registers": config.registers}
    common.start(kernel, programs, x, *args, **meta)


def check_weight(op: str, name: str, weight: Tensor, x: Tensor, outputs: int | None, inputs: int | None) -> None:
    """A 1x1 weight ``[outputs, inputs, 1, 1]``, contiguous, of the dtype and device of `x`; None: any number."""
    checks.device(op, name, weight, x)
    wanted = f"[{'K' if outputs is None else outputs}, {'C' if inputs is None else inputs}, 1, 1]"
    fits = weight.dim() == 4 and tuple(weight.shape[2:]) == (1, 1)
    fits = fits and outputs in (None, weight.shape[0]) and inputs in (None, weight.shape[1])
    if not fits:
        checks.fail(op, f"{name} has shape {list(weight.shape)}; pass a {wanted} weight")
    if weight.dtype != x.dtype:
        checks.fail(op, f"{name} is {weight.dtype} but the activations are {x.dtype}; pass one dtype")
    if not weight.is_contiguous():
        checks.fail(op, f"{name} is not contiguous; pass {name}.contiguous()")


# Device side ----------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b``, accumulated in float32."""
    if _INTERPRETING:  # its product of bfloat16 is garbage
        return acc + tl.dot(widen(a), widen(b), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_of(program, column_tiles):
    """Row tile and column tile of a program; column tiles of the same rows follow each other."""
    return program // column_tiles, program % column_tiles


@triton.jit
def read_rows(row, W_OUT, HW_OUT, H, W, STRIDE_H, STRIDE_W, BLOCK_M: tl.constexpr):
    """Input rows (pixels) that a strided convolution reads for the output rows from `row` on, in int64.

    One 64-bit division per tile; one per row made ptxas spill a float32 kernel.
    """
    sample = row // HW_OUT
    m = (row - sample * HW_OUT).to(tl.int32) + tl.arange(0, BLOCK_M)
    samples = m // HW_OUT
    pixel = m - samples * HW_OUT
    h = pixel // W_OUT
    w = pixel - h * W_OUT
    return ((sample + samples) * H + h * STRIDE_H) * W + w * STRIDE_W


@triton.jit
def apply_activation(x, scale, shift, dtype: tl.constexpr):
    """``relu(scale*x + shift)`` of a loaded tile, rounded to `dtype`; scale and shift broadcast along rows."""
    y = tl.fma(widen(x), scale, shift)
    return narrow(tl.where(y < 0, 0.0, y), dtype)


@triton.jit
def apply_activation_in(in_rows, x, scale, shift, dtype: tl.constexpr):
    """The same, zero in rows that do not exist: for sums over rows, as there relu(shift) may be infinite."""
    y = tl.fma(widen_pairs(x), scale, shift)
    return narrow_pairs(tl.where(in_rows[:, None], tl.where(y < 0, 0.0, y), 0.0), dtype)


@triton.jit
def multiply(
    x_ptr, row, in_rows,  # pixels of C channels; first output row of the tile, and which of its rows exist
    weight_ptr, in_cols,  # [K, C] from the tile's first output channel on, and which of its channels exist
    scale_ptr, shift_ptr,  # [C], both or None
    C, PITCH, W_OUT, HW_OUT, H, W,  # from a pixel of x to the next; its sizes matter only where a stride is not 1
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, CHANNELS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``x^ W'`` in float32 for a tile of output rows and output channels, x^ being plain or lazy (`apply_activation`).

    The result is [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] with CHANNELS_FIRST: then a thread holds few channels and
    many of their rows, so that per-channel vectors take few registers and sums over rows few shuffles.
    """
    if STRIDE_H == 1 and STRIDE_W == 1:
        x_ptr += row * PITCH
        x_rows = tl.arange(0, BLOCK_M)
    else:
        x_rows = read_rows(row, W_OUT, HW_OUT, H, W, STRIDE_H, STRIDE_W, BLOCK_M)
    weight_rows = tl.arange(0, BLOCK_N)
    if CHANNELS_FIRST:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, C, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        in_depth = depth < C
        inside = in_rows[:, None] & in_depth[None, :]
        x = tl.load(x_ptr + (x_rows[:, None] * PITCH + depth[None, :]), mask=inside, other=0.0)
        inside = in_cols[:, None] & in_depth[None, :]
        weight = tl.load(weight_ptr + (weight_rows[:, None] * C + depth[None, :]), mask=inside, other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + depth, mask=in_depth, other=0.0)[None, :]
            shift = tl.load(shift_ptr + depth, mask=in_depth, other=0.0)[None, :]
            x = apply_activation(x, scale, shift, x_ptr.dtype.element_ty)
        if CHANNELS_FIRST:
            acc = dot(weight, tl.trans(x), acc, PRECISION)
        else:
            acc = dot(x, tl.trans(weight), acc, PRECISION)
    return acc
