"""What a model is timed against. One file per peer; the file's name is the peer's.

A peer is a module with ``unavailable(device) -> str``, why it cannot run here or an empty text, and
``prepare(model) -> model``, which may change the model it is given. ``TRAINS = False``: it evaluates only. ``DTYPES``:
which of ``--dtype`` it can run, if not all. ``COUNTED = True``: what it keeps for backward is told. A model with
``is_bound`` makes nothing that could be compared. To add one, add a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ..errors import Refused

STOCK = "eager"
OURS = "fused"


def names() -> list[str]:
    """All peers: stock, ours, then the others."""
    others = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return [STOCK, OURS, *(name for name in others if name not in (STOCK, OURS))]


def load(name: str) -> ModuleType:
    """The peer called `name`.

    Raises:
        Refused: there is none; the text lists those there are.
    """
    if name not in names():
        raise Refused(f"unknown peer {name!r}; accepted are {', '.join(names()[2:])}")
    return importlib.import_module(f"{__name__}.{name}")
