"""How often a block of a kernel goes round each of its loops, from the arguments of its launch.

A kernel of Triton's has at most two levels of loops that matter: over tiles of rows and, for products, over the depth.
Which loop of the machine code is which follows from what is in it.
"""

from __future__ import annotations

import dataclasses

import sass

from resnet_fused.backends.triton.common import cdiv


@dataclasses.dataclass(frozen=True)
class Trips:
    """Of one block."""

    tiles: float = 1  # of the loop over row tiles
    products: tuple[float, ...] = ()  # of the loops with products within it, in the source's order; (): it has them
    sometimes: float = 1  # share of the rounds of a loop with products in which what can be passed by is run
    alternatives: bool = False  # the loops with products stand beside each other, the one that loads less first
    step_flops: int = 0  # of a round of a loop with products, in the source
    step_bytes: float = 0  # that a round of a loop without products moves, in the source


def of_triton(kernel: str, values: dict, moved: int, programs: int) -> Trips:
    """Of a launch of one of this package's Triton kernels. `values`: its arguments by name."""
    get = values.get
    tiles, step = get("TILES", 1), 2 * get("BLOCK_M", 0) * get("BLOCK_N", 0) * get("BLOCK_K", 0)
    if kernel == "conv1x1_kernel":  # both loops are one
        steps = cdiv(get("UNITS_IN") * get("DIV_IN"), get("BLOCK_K"))
        return Trips(tiles * steps, sometimes=1 / steps, step_flops=step)
    if kernel == "conv1x1_join_kernel":
        depths = [get("UNITS") * get("DIV")] + [get("UNITS2") * get("DIV2")] * (get("x2_ptr") is not None)
        return Trips(1, tuple(cdiv(depth, get("BLOCK_K")) for depth in depths), step_flops=step)
    if kernel == "conv1x1_dgrad_kernel":
        depths = [get("UNITS_K") * get("DIV_K")] * (get("weight_ptr") is not None)
        depths += [get("UNITS_C") * get("DIV_C")] * (get("coupling_ptr") is not None)
        return Trips(tiles, tuple(cdiv(depth, get("BLOCK_K")) for depth in depths), step_flops=step)
    if kernel == "conv1x1_wgrad_kernel":
        return Trips(tiles, step_flops=2 * get("BLOCK_M") * get("BLOCK_K") * get("BLOCK_C"))
    if kernel == "gram_kernel":
        on_diagonal = get("column_tiles") / get("pairs")
        step = 2 * get("BLOCK_M") * get("BLOCK_C") ** 2
        return Trips(1, (tiles * on_diagonal, tiles * (1 - on_diagonal)), alternatives=True, step_flops=step)
    if kernel == "conv1x1_backward_kernel":
        return Trips(tiles)
    if "TILES" in values and "pool" not in kernel:
        return Trips(tiles, step_bytes=moved / (programs * tiles))
    return Trips(tiles)


@dataclasses.dataclass(frozen=True)
class Counted:
    """Blocks of a function with how often each is run, and the loop with most of the work."""

    often: tuple[float, ...]
    main: sass.Loop | None


def frequencies(found: list[sass.Block], code: list[sass.Instruction], warps: int, trips: Trips) -> Counted:
    """How often each of the blocks is run."""
    loops = sass.loops(found)
    rounds = dict.fromkeys((loop.header for loop in loops), 1.0)
    own = {loop.header: sass.own_blocks(loop, loops) for loop in loops}

    def inside(loop: sass.Loop) -> list[sass.Instruction]:
        return [each for index in sorted(own[loop.header]) for each in found[index].code]

    products = sorted((loop for loop in loops if any(i.kind == "tensor" for i in inside(loop))), key=_header)
    if products:
        main = _products(rounds, products, loops, inside, code, warps, trips)
    else:
        main = _passes(rounds, loops, inside, warps, trips)
    often = [1.0] * len(found)
    for loop in loops:
        for index in loop.blocks:
            often[index] *= rounds[loop.header]
    if main is not None and products and trips.sometimes != 1:
        for index in main.blocks - main.every:
            often[index] *= trips.sometimes
    return Counted(tuple(often), main)


def _header(loop: sass.Loop) -> int:
    return loop.header


def _products(rounds, products, loops, inside, code, warps, trips: Trips) -> sass.Loop:
    def done(loop: sass.Loop) -> int:
        return sum(sass.flops(i, code, warps) for i in inside(loop) if i.kind == "tensor")

    def loaded(loop: sass.Loop) -> int:
        return sum(i.bytes for i in inside(loop) if i.kind in ("load", "copy"))

    within = trips.products or (trips.tiles,)
    if trips.alternatives:
        products = sorted(products, key=loaded)
    for loop, often in zip(products, within, strict=False):
        unrolled = max(1, round(done(loop) / trips.step_flops)) if trips.step_flops else 1
        rounds[loop.header] = often / unrolled
    for loop in products[len(within) :]:  # what is left of an unrolled one
        rounds[loop.header] = 0.0
    if trips.products and not trips.alternatives:
        around = [loop for loop in loops if any(loop.blocks > p.blocks for p in products)]
        for loop in around[:1]:
            rounds[loop.header] = trips.tiles
    return max(products, key=lambda loop: rounds[loop.header] * done(loop))


def _passes(rounds, loops, inside, warps, trips: Trips) -> sass.Loop | None:
    def moved(loop: sass.Loop) -> int:
        return sum(32 * warps * i.bytes for i in inside(loop) if i.kind in ("load", "copy", "store"))

    outer = [loop for loop in loops if not any(other.blocks > loop.blocks for other in loops) and moved(loop)]
    if not outer:
        return None
    main = max(outer, key=moved)
    unrolled = max(1, round(moved(main) / trips.step_bytes)) if trips.step_bytes else 1
    rounds |= {loop.header: 0.0 for loop in outer}
    rounds[main.header] = trips.tiles / unrolled
    return main
