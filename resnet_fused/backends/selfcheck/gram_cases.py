"""Cases of the Gram family compiled for GPUs: several tiles and splits, several steps of each, ragged ends.

How many splits a call gets depends on the number of multiprocessors, but none has less than 256 rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .draws import Case, Draw
from .lazy_cases import GramJoin, norm


def gram(dtype: torch.dtype) -> Iterator[Case]:
    """Six pairs of three tiles, and rows that end within a stage of the last of up to twelve splits."""
    draw = Draw((2, 136, 40, 41))
    lazy = {"scale": draw.vector(), "shift": draw.vector()}
    yield Case("several tiles and splits, lazy", (draw.data(), draw.vector()), lazy)
    draw = Draw((3, 65, 31, 29))
    yield Case("odd channels, splits, stride 2", (draw.data(), draw.vector()), {"stride": [2, 2]})


def _wide() -> GramJoin:
    """More than one panel of 128 columns, and than one step of 64 rows of the weight."""
    return GramJoin((2, 200, 13, 11), 70)


def gram_norm(dtype: torch.dtype) -> Iterator[Case]:
    join = _wide()
    yield Case("several panels, batch norm", join.norm(), norm(join, 70))


def gram_grad(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("several panels, two launches", _wide().grad(), {})
