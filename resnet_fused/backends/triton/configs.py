"""Tile configurations of the matrix-product kernels: defaults that need no tuning, and a table of tuned ones.

A default is for a dtype's width and fits every architecture of its class: 227 KiB of shared memory a block on sm_90 and
sm_100, 163 KiB on sm_80, 99 KiB on sm_86, sm_89 and sm_120. Narrow layers get narrow tiles, so that no column is
computed for nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
import triton

from .. import cards


@dataclasses.dataclass(frozen=True)
class Config:
    """One way to tile a product of ``[rows, depth]`` and ``[depth, columns]``."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None  # at most so many a thread; None: ptxas may spill a few to fit more blocks


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A measured choice."""

    config: Config
    provenance: str  # the file in benchmarks/results/ whose rows chose it


Key = tuple[str, int, int, int, int]  # op, compute capability, element size, columns, depth

#: What was fastest for a product there. Empty: no GPU was measured yet.
TUNED: dict[Key, Tuned] = {}
_asked: list[dict[Key, Config]] = []  # of the innermost :func:`asked` last

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
SMALL_SHARED_MEMORY = (86, 87, 89, 120, 121)  # 99 KiB a block


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds `n`, between `low` and `high`."""
    return max(low, min(high, 1 << max(0, n - 1).bit_length()))


def capability(device: torch.device) -> int:
    """Compute capability as one number, e.g. 90, of the card that launches on `device` are shaped for."""
    return cards.of(device).arch


@functools.lru_cache(maxsize=1024)
def config(op: str, arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The tuned configuration for this product on this architecture, else the default."""
    key = (op, arch, element_size, columns, depth)
    if key in TUNED:
        chosen = TUNED[key].config
    else:
        chosen = DEFAULTS.get(op, default)(arch, element_size, columns, depth)
        chosen = chosen if columns % 8 == depth % 8 == 0 else without_vectors(chosen, element_size)
    for found in _asked:
        found[key] = chosen
    return chosen


@contextlib.contextmanager
def asked() -> Iterator[dict[Key, Config]]:
    """Within the block, what is asked for and what is answered: for a sweep, which has to know what to vary."""
    found: dict[Key, Config] = {}
    _forget()
    _asked.append(found)
    try:
        yield found
    finally:
        _asked.remove(found)


@contextlib.contextmanager
def trying(key: Key, candidate: Config) -> Iterator[None]:
    """Within the block, `candidate` is the answer for `key`."""
    before = TUNED.get(key)
    TUNED[key] = Tuned(candidate, "tried by a sweep")
    _forget()
    try:
        yield
    finally:
        del TUNED[key]
        if before is not None:
            TUNED[key] = before
        _forget()


def _forget() -> None:
    """Drop what was answered from the table, and the plans of calls that were made from that."""
    from .. import dispatch  # which needs this room

    config.cache_clear()
    dispatch.forget()


def without_vectors(chosen: Config, element_size: int) -> Config:
    """For channels that 8 does not divide: each element takes an address of its own, in registers, and a mask."""
    blocks = (min(128 // element_size, block) for block in (chosen.block_m, chosen.block_n, chosen.block_k))
    return Config(*blocks, warps=8, stages=chosen.stages, registers=255)


def default(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """128 rows, up to 128 columns; 128 bytes of depth, which is one swizzled row of shared memory."""
    block_n = power_of_two(columns, 16, 128)
    block_k = power_of_two(depth, 16, 128 // element_size)
    stages = 2 if arch in SMALL_SHARED_MEMORY else 3
    return Config(128, block_n, block_k, 8 if block_n == 128 else 4, stages)


def gram_rows(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """float32 products of 16 rows, on the ordinary units: 16 values a thread, so that each loaded one serves four.

    A step of the depth divides it where it can: at 40 channels, steps of 32 spilled on sm_120.
    """
    return Config(16, power_of_two(columns, 32, 128), max(16, min(depth & -depth, 64 // element_size)), 4, 2)


def gram_statistics(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The same, and batch norm of each row at the end, for which more columns leave no registers."""
    chosen = gram_rows(arch, element_size, columns, depth)
    return dataclasses.replace(chosen, block_n=min(chosen.block_n, 64 if element_size == 2 else 32))


def gram_square(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The same for square tiles over a long depth, small ones: half of a square has few."""
    return Config(32, 32, 16, 2, 2)


def data_gradient(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """A lazy gradient on load takes as many registers as the accumulator: one of both is small, unless both are shared.

    Short products on sm_90 and sm_100 get two small programs a multiprocessor, one loads while the other stores.
    """
    if arch // 10 not in (9, 10):  # operands pass through registers there
        block_n = power_of_two(columns, 16, 128)
        block_k = power_of_two(depth, 16, 64 // element_size)
        return Config(64, block_n, block_k, 8 if block_n == 128 else 4, 3)
    wide = columns > 64 and depth > 128
    block_n = power_of_two(columns, 16, 128 if wide else 64)
    block_k = power_of_two(depth, 16, (128 if wide else 64) // element_size)
    return Config(128, block_n, block_k, 8 if wide else 4, 3)


def data_gradient_ieee(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """float32 products on the ordinary units, which unroll the depth into registers; two programs fit on an SM."""
    return Config(64, power_of_two(columns, 16, 64), 16, 8, 2, 128)


def over_rows(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """A ``[columns, depth]`` tile of a product over rows; 64 rows a step, fewer where tiles fill the registers.

    On sm_100 sums lie in tensor memory instead.
    """
    block_n, block_k = power_of_two(columns, 16, 128), power_of_two(depth, 16, 256 // element_size)
    fills = block_n * block_k > 128 * 64 and arch // 10 != 10
    rows = 32 if element_size == 4 or fills else 64
    if element_size == 4 and arch < 90:
        rows = 16
    stages = 2 if arch in SMALL_SHARED_MEMORY else 3
    return Config(rows, block_n, block_k, 8 if block_n * block_k >= 128 * 64 else 4, stages)


def over_rows_ieee(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """float32 products on the ordinary units, which unroll the rows into registers: fewer with four warps."""
    chosen = over_rows(arch, element_size, columns, depth)
    return dataclasses.replace(chosen, block_m=16) if chosen.warps == 4 else chosen


def both_gradients(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """All of the depth stays in registers, as parts of `block_k`, with `block_n` columns: a quarter of them.

    Without the tensor cores of sm_90 and sm_100 operands and the second product take registers too: half of that.
    """
    if columns % 8 or depth % 8:  # each element takes an address of its own
        rows, block_k, block_n = 16, 64, 64
    elif arch // 10 in (9, 10):
        rows, block_k, block_n = (64, 64, 128) if depth <= 128 else (64, 128, 64)
    else:
        rows, block_k, block_n = 32, 128, 128 if depth <= 64 else 64 if depth <= 128 else 32
    return Config(rows, power_of_two(columns, 32, block_n), power_of_two(depth, 16, block_k), 8, 2, 255)


def both_gradients_and_sums(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The vectors of a second term, and sums, take registers where nearly all are taken."""
    chosen = both_gradients(arch, element_size, columns, depth)
    if depth <= 128:
        return dataclasses.replace(chosen, block_n=min(chosen.block_n, 64 if arch // 10 in (9, 10) else 32))
    rows, block_k, block_n = {9: (32, 64, 64), 10: (32, 128, 32)}.get(arch // 10, (16, 256, 64))
    return dataclasses.replace(chosen, block_m=rows, block_k=block_k, block_n=min(chosen.block_n, block_n))


def symmetric(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """A square tile of a product of a matrix with itself, over rows; float32 on the ordinary units."""
    block = power_of_two(columns, 16, 256 // element_size)
    rows = 16 if element_size == 4 else 64
    if block == 128 and arch // 10 not in (9, 10):  # operands pass through registers there
        rows = 32
    stages = 2 if element_size == 4 else 3
    if arch // 10 == 10 and TRITON < (3, 7):  # Triton 3.6 cannot pipeline a product of a tile with itself there
        stages = 1
    return Config(rows, block, block, 8 if block == 128 else 4, stages)


def many_warps(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The default, but eight warps from 64 columns on: four need twice the registers. Wide float32: 64 rows."""
    chosen = default(arch, element_size, columns, depth)
    rows = 64 if element_size == 4 and chosen.block_n == 128 else 128
    return dataclasses.replace(chosen, block_m=rows, warps=8 if chosen.block_n >= 64 else 4)


def statistics_ieee(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """float32 products on the ordinary units, and sums of the result: half the rows of `data_gradient_ieee`."""
    return Config(32, power_of_two(columns, 16, 64), 16, 4, 2)


def join(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """Short products are bound by memory: two small programs a multiprocessor, one loads while the other stores."""
    chosen = many_warps(arch, element_size, columns, depth)
    small = depth * element_size <= 256 or arch in SMALL_SHARED_MEMORY
    return dataclasses.replace(chosen, block_m=64) if chosen.block_n == 128 and small else chosen


def join_two_terms(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """A second accumulator, or the vectors of a second affine term, would not fit the registers beside 128 x 128."""
    chosen = many_warps(arch, element_size, columns, depth)
    return dataclasses.replace(chosen, block_m=64) if chosen.block_n == 128 else chosen


#: Defaults of launches that :func:`default` does not fit.
DEFAULTS = {
    "gram_norm": gram_statistics,
    "gram_grad": gram_rows,
    "gram_grad coupling": gram_square,
    "conv1x1_wgrad": over_rows,
    "conv1x1_wgrad ieee": over_rows_ieee,
    "conv1x1_dgrad": data_gradient,
    "conv1x1_dgrad ieee": data_gradient_ieee,
    "conv1x1_backward": both_gradients,
    "conv1x1_backward sums": both_gradients_and_sums,
    "gram": symmetric,
    "conv1x1": many_warps,
    "conv1x1 ieee": statistics_ieee,
    "conv1x1_join": join,
    "conv1x1_join ieee": data_gradient_ieee,
    "conv1x1_join two terms": join_two_terms,
}
