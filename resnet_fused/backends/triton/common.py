"""What the Triton kernels share: tiles of the row-major matrix [M, C], exact casts, launches, registration.

Every kernel sees a channels_last tensor as rows of C channels. A program owns BLOCK_C channels and walks over row tiles
of BLOCK_M, so per-channel vectors are loaded once. Three rules keep accesses 16 bytes wide and addresses right:

* C arrives as ``UNITS * DIV`` with DIV a constexpr power of two, so the compiler knows how C divides; Triton's own
  specialisation knows multiples of 16 only, and recompiles for each.
* The row of a tile is computed in int64 (`first_row`) and added to the pointer as one scalar; offsets within a tile are
  int32. No variant for large tensors exists, so none can be forgotten in tests.
* Multiply-adds are spelled ``tl.fma`` and contraction is switched off (ENABLE_FP_FUSION): the backward recomputes the
  very bits, hence the very sign, that the forward clamped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

from ...ops import Op
from ...ops.contract import Tensor
from .. import cards
from ..declaration import Kernel
from . import limits, plans, trace
from .bound import Bound

#: True where TRITON_INTERPRET=1 was set before Triton was imported: kernels run on CPU tensors, in numpy.
INTERPRETING: bool = bool(triton.knobs.runtime.interpret)
_INTERPRETING = tl.constexpr(INTERPRETING)

NAMESPACE = "resnet_fused_triton"
NUM_WARPS = 4
NUM_STAGES = 3  # Triton's own default
ENABLE_FP_FUSION = False  # explicit: its default changes in Triton 3.10
MIN_BLOCK_C = 8  # one byte of the packed mask
REDUCTION_PROGRAMS = 1024  # about eight per SM of an H100; a constant, so that sums have the same bits on every card
POINTWISE_PROGRAMS = 4096  # beyond this many, a program takes several row tiles and reuses its vectors

_library = torch.library.Library(NAMESPACE, "DEF")


# Host side ------------------------------------------------------------------------------------------------------


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def block_c(channels: int, cap: int) -> int:
    """Channels per tile: a power of two from 8 to `cap` that pads C least, the widest of equals."""
    if channels <= MIN_BLOCK_C:
        return MIN_BLOCK_C
    widths = [w for w in (8, 16, 32, 64, 128, 256) if w <= cap]
    wide = [w for w in widths if w >= 32] if channels >= 32 else widths  # keep a row's piece a full sector or more
    return min(wide, key=lambda w: (cdiv(channels, w) * w, -w))


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel covers [M, C]: `chunks` of consecutive row tiles, times column tiles, one program each."""

    chunks: int
    programs: int
    meta: dict  # the arguments every kernel takes: M, UNITS, TILES, DIV, BLOCK_M, BLOCK_C


def tiling(x: Tensor, tile: int, cap: int, programs: int, min_tiles: int = 1) -> Tiling:
    """Cover `x`, a channels_last ``[N, C, H, W]`` with at least one element.

    Args:
        tile: elements per tile.
        cap: the widest BLOCK_C.
        programs: how many programs to aim for.
        min_tiles: row tiles that a program should at least have.
    """
    n, c, h, w = x.shape
    return _tiling(n * h * w, c, tile, cap, cards.of(x.device).programs(programs), min_tiles)


@functools.lru_cache(maxsize=1024)  # a network asks for the same few at every step
def _tiling(rows: int, c: int, tile: int, cap: int, programs: int, min_tiles: int) -> Tiling:
    width = block_c(c, cap)
    column_tiles = cdiv(c, width)
    row_tiles = cdiv(rows, tile // width)
    chunks = max(1, min(programs // column_tiles, row_tiles // min_tiles))
    tiles = cdiv(row_tiles, chunks)
    chunks = cdiv(row_tiles, tiles)
    div = min(c & -c, 16)
    meta = {"M": rows, "UNITS": c // div, "TILES": tiles, "DIV": div, "BLOCK_M": tile // width, "BLOCK_C": width}
    return Tiling(chunks, chunks * column_tiles, meta)


def launch(kernel, plan: Tiling, x: Tensor, *args, **meta) -> None:
    """Start `kernel` on `x` and the other `args` as `plan` says, on the device of `x`."""
    start(kernel, plan.programs, x, *args, **plan.meta, **meta)


def start(
    kernel, programs: int, x: Tensor, *args,
    warps: int = NUM_WARPS, stages: int = NUM_STAGES, registers: int | None = None, bound: Bound | None = None, **meta,
) -> None:  # fmt: skip
    """Start `programs` programs of `kernel`, whose first argument is `x`, on the device of `x`.

    The one place where a kernel is launched: tests replace it to count, and on meta tensors it only takes notes.
    `bound`: what a plan knows of this launch from the last time; it is given that here.
    """
    device = x.device
    other_gpu = device.type == "cuda" and device.index != torch.cuda.current_device()
    if bound is not None and not other_gpu and bound.start(programs, device, (x, *args)):
        return
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers, "enable_fp_fusion": ENABLE_FP_FUSION}
    if device.type == "meta":
        settings = {"warps": warps, "stages": stages, "registers": registers}
        return trace.note(kernel, programs, (x, *args), meta, options, settings)
    with torch.cuda.device(device) if other_gpu else contextlib.nullcontext():
        compiled = kernel[(programs,)](x, *args, **meta, **options)
    if bound is not None and device.type == "cuda":
        bound.keep(compiled, 1 + len(args), meta)


_own_start = start


def _prepare(run: Callable, args: tuple, kwargs: dict) -> plans.Plan | None:
    """The plan of calls like this one. It asks for :func:`start` whenever it runs; what listens here is this one."""
    global start
    replaced, start = start, _own_start
    try:
        return plans.of_call(run, lambda: start, args, kwargs)
    finally:
        start = replaced


@functools.cache
def build_identity() -> str:
    """A hash of all sources of this room, which share helpers, of Triton's version, and of the interpreter's switch."""
    digest = hashlib.sha256(f"{triton.__version__} {INTERPRETING}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def mode(dtype: torch.dtype) -> str:
    """What a setting of PyTorch's makes of float32 products; nothing for other dtypes."""
    from .gemm import precision  # which needs this module

    return precision(dtype) if dtype == torch.float32 else ""


def register(op: Op, run: Callable) -> Kernel:
    """Make `run` an op of its own in the dispatcher, opaque to torch.compile, and declare it within its limits."""
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(op.name + op.schema, tags=tags)
    _library.impl(op.name, run, "CUDA")
    if INTERPRETING:
        _library.impl(op.name, run, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), op.name).default
    launches = functools.partial(trace.launches, run)
    prepare = functools.partial(_prepare, run)
    return Kernel(
        overload,
        **vars(limits.of(op)),
        needs_selfcheck=True,
        build=build_identity(),
        launches=launches,
        mode=mode,
        prepare=prepare,
    )


# Device side ----------------------------------------------------------------------------------------------------


@triton.jit
def first_row(chunk, tiles, i, BLOCK_M: tl.constexpr):
    """First row of tile `i` of a chunk. In int64 before the first multiply: M * C passes 2^31 at real batch sizes."""
    return (chunk.to(tl.int64) * tiles + i) * BLOCK_M


@triton.jit
def rows_in(row, M, BLOCK_M: tl.constexpr):
    """Which rows of the tile that begins at `row` exist. Rows are compared in int32, after clamping."""
    left = tl.minimum(M - row, BLOCK_M).to(tl.int32)
    return tl.arange(0, BLOCK_M) < left


@triton.jit
def widen(x):
    """float32 of a loaded tile."""
    if _INTERPRETING and x.dtype == tl.bfloat16:  # its own conversion is not to be trusted with zeros: move the bits
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 to `dtype`, to nearest even."""
    if _INTERPRETING and dtype == tl.bfloat16:  # its own conversion truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(x == x, rounded, bits | 0x400000)  # rounding must not turn a NaN into an infinity
        return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def narrow_pairs(x, dtype: tl.constexpr):
    """As `narrow`, two bfloat16 by one instruction.

    Of what ``tl.where`` made, the compiler would else round what is selected from, a value at a time, select among 16
    bits and pack those. Whether that is worse was counted kernel by kernel, by ``benchmarks/machine_code.py``.
    """
    if not _INTERPRETING and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return narrow(x, dtype)


@triton.jit
def widen_pairs(x):
    """As `widen`, two bfloat16 by two instructions, where the compiler takes three."""
    if not _INTERPRETING and x.dtype == tl.bfloat16:
        asm: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    return widen(x)


@triton.jit
def clamp_below_zero(y):
    """ReLU as stock has it: NaN and -0.0 pass, which a maximum would drop."""
    return tl.where(y < 0, 0.0, y)


@triton.jit
def samples_of(row, HW, BLOCK_M: tl.constexpr):
    """The sample of each row of a tile; one 64-bit division per tile."""
    sample = row // HW
    within = (row - sample * HW).to(tl.int32)
    return sample + (within + tl.arange(0, BLOCK_M)) // HW


@triton.jit
def load_factor(factor_ptr, row, in_rows, HW, BLOCK_M: tl.constexpr):
    """The per-sample factor of each row of a tile, as a column."""
    return tl.load(factor_ptr + samples_of(row, HW, BLOCK_M), mask=in_rows, other=0.0)[:, None]


@triton.jit
def pack_bits(keep, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Booleans [BLOCK_M, BLOCK_C] to bytes [BLOCK_M, BLOCK_C / 8]; channel c is bit c % 8."""
    bits = tl.reshape(keep.to(tl.int32), (BLOCK_M, BLOCK_C // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Inverse of `pack_bits`."""
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_C)) != 0
