"""The binaries that a call runs, and the smallest cases that run all of them in every way in which the call does.

What decides whether a verdict on one call holds for another is its :class:`Configuration`: the binaries that it starts
(tiles, warps, stages, compile-time constants, which arguments are there, how they are aligned), and which of their
sizes are more than one: splits, chunks, row tiles of a program, tiles of columns. A case that has the same, on other
sizes, takes the same branches. Of the channels it keeps two tiles and a rest, of the pixels enough for several splits,
and an odd number, so that masks are met. Programs share row tiles as on a card with two multiprocessors where that lets
small tensors have several.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math

from ..cards import Card
from ..declaration import Kernel
from .problems import Problem, problem

#: Samples, height and width of candidates: odd numbers of pixels, beyond tiles of 16 to 128 rows.
GRIDS = ((3, 11, 9), (3, 21, 19), (3, 41, 33), (3, 87, 63), (3, 139, 121))


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a call starts."""

    features: frozenset  # (binary, name of a size that is more than one, or "")
    blocks: int  # the largest tile of channels
    digest: str  # of the features, the same in every process

    @property
    def binaries(self) -> frozenset:
        return frozenset(binary for binary, _ in self.features)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A problem, run as on a card."""

    problem: Problem
    card: Card

    @property
    def cost(self) -> int:
        """Multiplications, about."""
        return math.prod(self.problem.grid) * math.prod(self.problem.channels.values())

    def case(self, digest: str):
        """Its arguments, named after what they are."""
        n, h, w = self.problem.grid
        sizes = ", ".join(f"{letter} {size}" for letter, size in self.problem.channels.items())
        shared = f", shared as by {self.card.sms} multiprocessors" if self.card.scale > 1 else ""
        return self.problem.case(f"configuration {digest}: {n}x{h}x{w}, {sizes}{shared}", self.card)


def configuration(launches: list) -> Configuration:
    """Of the launches of a call."""
    features, blocks = set(), 1
    for launch in launches:
        features.add((launch.binary, ""))
        features |= {(launch.binary, name) for name, size in launch.sizes.items() if size > 1}
        features |= {(launch.binary, "programs")} if launch.programs > 1 else set()
        tiles = [value for name, value in launch.values.items() if name in ("BLOCK_N", "BLOCK_K", "BLOCK_C")]
        if launch is launches[0] or "BLOCK_M" in launch.values:  # not of a launch that only adds partial sums
            blocks = max(blocks, *tiles)
    digest = hashlib.sha256(repr(sorted(map(repr, features))).encode()).hexdigest()[:12]
    return Configuration(frozenset(features), blocks, digest)


def of_call(kernel: Kernel, args: tuple, kwargs: dict, card: Card) -> Configuration:
    """Of a call on real, or meta, tensors."""
    return configuration(kernel.launches(args, kwargs, card))


def candidates(whole: Problem, blocks: int, card: Card) -> list[Candidate]:
    """Problems of the same kind as `whole`, the cheapest first; at last the call itself."""
    ways = list(itertools.product(*({size, shrunk(size, blocks)} for size in whole.channels.values())))
    if whole.given.get("weight", whole) is None:  # then the channels of both sides are one number
        ways = [way for way in ways if len(set(way)) == 1]
    found = []
    for grid, sizes in itertools.product(GRIDS, ways):
        channels = dict(zip(whole.channels, sizes, strict=True))
        found += [Candidate(whole.resized(grid, channels), shared) for shared in (card.small(), card)]
    found.sort(key=lambda candidate: candidate.cost)
    return [*found, Candidate(whole, card)]


def shrunk(channels: int, block: int) -> int:
    """Two tiles and a rest that divides like `channels`, or as many where they are fewer."""
    return min(channels, 2 * block + min(16, channels & -channels))


def covering(kernel: Kernel, whole: Problem, wanted: Configuration, card: Card) -> list[Candidate]:
    """The cheapest candidates that together have every feature of `wanted`."""
    chosen: list[tuple[Candidate, frozenset]] = []
    missing = set(wanted.features)
    for candidate in candidates(whole, wanted.blocks, card):
        has = configuration(kernel.launches(*candidate.problem.meta(), candidate.card)).features & wanted.features
        if has & missing:
            chosen.append((candidate, has))
            missing -= has
        if not missing:
            break
    if missing:
        raise RuntimeError(f"no case starts {sorted(map(repr, missing))[0]}")
    for pair in list(chosen[:-1]):  # what a later one has too
        others = [has for other, has in chosen if other is not pair[0]]
        if wanted.features <= frozenset().union(*others):
            chosen.remove(pair)
    return [candidate for candidate, _ in chosen]


def cases(kernel: Kernel, op: str, args: tuple, kwargs: dict, card: Card) -> list:
    """Cases that a kernel must pass before this call may run."""
    wanted = of_call(kernel, args, kwargs, card)
    whole = problem(op, args, kwargs)
    return [candidate.case(wanted.digest) for candidate in covering(kernel, whole, wanted, card)]
