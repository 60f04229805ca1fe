"""How many programs share a sum over rows: as many as fill whole waves of a card's multiprocessors.

A sum over rows into ``tiles`` tiles is split so that ``tiles * splits`` programs run: each split walks over rows of its
own and stores partial sums, which another launch adds. A wave is what a card runs at once; a last wave of a few
programs takes as long as a full one. So the number of splits follows from the number of multiprocessors, and sums
differ in their last bits between cards, not between runs. What stands against whole waves:

* bytes: partial sums cost at most `CHEAP` of the reads where that keeps most multiprocessors busy, else at most
  `L2_BYTES`, so that they stay within L2;
* rows: a split has `MIN_ROWS` or more, so that a small layer does not spend its time on merging.
"""

from __future__ import annotations

import dataclasses
import functools

from .configs import Config

CHEAP = 0.02  # partial sums up to this share of the reads
BUSY = 0.8  # of the multiprocessors are enough where that keeps partial sums cheap
L2_BYTES = 24 << 20  # of partial sums, where they are not cheap; the smallest L2 of these cards has 40 MB
MIN_ROWS = 256
FULL = 0.85  # of a wave's places are taken, where neither bytes nor rows stand against it


@dataclasses.dataclass(frozen=True)
class Split:
    """How a sum over rows is shared."""

    splits: int
    row_tiles: int  # of a split
    bound: str  # what kept it from filling whole waves, "bytes" or "rows"; "" where it does


def resident(config: Config) -> int:
    """Programs of a product over rows that a multiprocessor holds at once, at least.

    Its registers decide: 65536, of which a program of eight warps takes up to 255 * 256 and one of four half of that.
    """
    return 1 if config.warps >= 8 else 2


def utilisation(programs: int, sms: int, per_sm: int) -> float:
    """Share of the places in its waves that a launch takes."""
    places = sms * per_sm
    return programs / (-(-programs // places) * places)


@functools.lru_cache(maxsize=1024)
def choose(
    rows: int,
    tiles: int,
    row_bytes: int,
    partial_bytes: int,
    block_m: int,
    sms: int,
    per_sm: int,
    most_rows: int | None = None,
    busy: float = BUSY,
) -> Split:
    """Split a sum over `rows`.

    Of the splits that fill their waves, the one that is expected to move the least: what is read, in proportion to the
    places left empty, and partial sums. Waves of `per_sm` programs a multiprocessor come before waves of one.

    Args:
        tiles: programs per split.
        row_bytes: read per row.
        partial_bytes: written and read again per split.
        block_m: rows of a tile.
        sms: multiprocessors.
        per_sm: programs that one holds, see :func:`resident`.
        most_rows: per split, whatever that costs.
        busy: share of the multiprocessors that loads from memory at its rate.
    """
    row_tiles = -(-rows // block_m)
    least = -(-rows // most_rows) if most_rows else 1
    by_rows = max(1, rows // MIN_ROWS)
    by_bytes = int(CHEAP * rows * row_bytes / partial_bytes)
    found = _splits(row_tiles, least, min(by_rows, by_bytes))
    if not any(utilisation(splits * tiles, sms, 1) >= busy for splits, _ in found):
        by_bytes = 2 * L2_BYTES // partial_bytes
        found = _splits(row_tiles, least, min(by_rows, by_bytes))

    def cost(split: tuple[int, int]) -> float:
        splits, size = split
        filled = utilisation(splits * tiles, sms, per_sm) * row_tiles / (splits * size)
        return rows * row_bytes / filled + splits * partial_bytes

    whole = [split for split in found if utilisation(split[0] * tiles, sms, per_sm) >= FULL]
    alone = [split for split in found if utilisation(split[0] * tiles, sms, 1) >= FULL]
    bound = "" if whole else "bytes" if by_bytes < by_rows else "rows"
    return Split(*min(whole or alone or found, key=cost), bound)


def _splits(row_tiles: int, least: int, most: int) -> list[tuple[int, int]]:
    """(splits, row tiles of each) for about `least` to `most` splits; fewer where each takes one more tile."""
    most = max(least, min(most, row_tiles))
    sizes = {-(-row_tiles // wanted) for wanted in range(least, most + 1)}
    return [(-(-row_tiles // size), size) for size in sorted(sizes)]
