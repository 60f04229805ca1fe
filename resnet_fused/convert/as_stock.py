"""Calls that are known to run wholly in stock operations, by the plan's choice: their modules run stock's forward.

The stock forward is right in every state that a module can be in, so such a call proves nothing, and costs what stock
costs. The key only says when the plan would choose the same again; whatever it does not name (a weight of another shape
in an old one's place) may miss a gain, never a result.
"""

from __future__ import annotations

import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..backends import current, precision
from ..blocks import drop_paths, runtime
from ..blocks.site import Site
from ..plan import choose, keys, measured
from .swap import STATE

_LIMIT = 64  # keys of a module after which they are collected anew


class _Kept(NamedTuple):
    """What is known of a module, as long as it and those within it are what they were."""

    within: tuple[nn.Module, ...]  # not itself, which must not be kept alive
    types: tuple[type, ...]  # its own, and of those
    children: tuple[nn.Module | None, ...]  # so too
    fused: tuple[nn.Module, ...]  # those within that carry settings
    parameters: tuple[dict, ...]  # of the convolutions, by name
    keys: set[tuple]


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


class _Within(threading.local):
    known = False


_within = _Within()


def is_within() -> bool:
    """Whether this is called within a known call, in which nothing is asked again."""
    return not torch.compiler.is_compiling() and _within.known


def is_known(module: nn.Module, x: object, part: object = None) -> bool:
    """Whether a call of `module`, or of `part` of it, with `x` would run stock's operations alone, as one before."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return False
    kept = _current(module)
    return kept is not None and _key(kept, module, x, part) in kept.keys


def run(stock: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The stock forward of a known call; in this thread, what it calls is not asked again."""
    before, _within.known = _within.known, True
    try:
        return stock(x)
    finally:
        _within.known = before


def _current(module: nn.Module) -> _Kept | None:
    """What is known of `module`, as long as the modules within it are those that they were, of their classes."""
    kept = _kept.get(module)
    modules = () if kept is None else (module, *kept.within)
    if kept is None or not all(map(operator.is_, map(type, modules), kept.types)):
        return None
    now = _children_of(modules)
    return kept if len(now) == len(kept.children) and all(map(operator.is_, now, kept.children)) else None


def _children_of(modules: Sequence[nn.Module]) -> tuple[nn.Module | None, ...]:
    return tuple(itertools.chain.from_iterable(map(dict.values, map(_CHILDREN, modules))))


_OWN, _TRAINING, _CHILDREN = map(operator.attrgetter, ("__dict__", "training", "_modules"))


def _key(kept: _Kept, module: nn.Module, x: torch.Tensor, part: object) -> tuple | None:
    """All that decides whether the plan leaves a call to stock; None where it must be asked."""
    if choose.is_directed() or not x.is_cpu:
        return None
    wanting = kept.parameters if torch.is_grad_enabled() else ()
    return (
        part,
        x.shape,
        x.dtype,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        current(),
        precision.of("default"),
        keys.threads(),
        measured.changes(),
        *[_settings(own.get(STATE)) for own in map(_OWN, (module, *kept.fused))],
        *map(bool, map(_TRAINING, (module, *kept.within))),
        *[getattr(own.get("weight"), "requires_grad", False) for own in wanting],
    )


def _settings(state: object) -> tuple[str, ...]:
    """What a fused module was fused with; a stage's state, and that of one unfused since, have none of it."""
    return tuple(getattr(state, name, "") for name in ("backend", "precision", "drop_path"))


class Ran(NamedTuple):
    """How many programs a thread has run other than in stock's operations by the plan's choice."""

    fused: int
    hindered: int

    def since(self) -> Ran:
        now = so_far()
        return Ran(now.fused - self.fused, now.hindered - self.hindered)


def so_far() -> Ran:
    """What this thread has run; nothing is told within a graph."""
    return Ran(0, 0) if torch.compiler.is_compiling() else Ran(runtime.fused_programs(), runtime.hindered_programs())


def note(
    module: nn.Module, sites: Sequence[Site], x: object, before: Ran, part: object = None, alone: bool = False
) -> bool:
    """Note that `module`, whose programs are `sites`, ran on `x`, if the plan has left all to stock since `before`.

    `alone`: of what is within it, only `sites` ran. Returns whether it has. What else kept one from running, a hook or
    a mode, may be gone the next time.
    """
    known = before.since() == (0, 0) and not torch.compiler.is_compiling()
    if known:
        keep(module, sites, x, part, alone)
    return known


def keep(module: nn.Module, sites: Sequence[Site], x: object, part: object, alone: bool = False) -> None:
    """Keep what is known of a call: :func:`is_known` is true of the next that is like it."""
    if type(x) is not torch.Tensor:
        return
    kept = _current(module)
    if kept is None or len(kept.keys) >= _LIMIT:
        kept = _read(module, sites, alone)
        chosen = "survivors" in [_settings(own.get(STATE))[-1] for own in map(_OWN, (module, *kept.fused))]
        if chosen and any(map(drop_paths.is_one, kept.within)):
            return  # where one draws, its block runs on other samples than stock's forward does
        _kept[module] = kept
    key = _key(kept, module, x, part)
    if key is not None:
        kept.keys.add(key)


def _read(module: nn.Module, sites: Sequence[Site], alone: bool) -> _Kept:
    read = [one for site in sites for one in (*site.norms, *site.convolutions)] if alone else module.modules()
    within = [one for one in read if one is not module]
    return _Kept(
        tuple(within),
        tuple(map(type, (module, *within))),
        _children_of((module, *within)),
        tuple(one for one in within if hasattr(one.__dict__.get(STATE), "backend")),
        tuple(one._parameters for one in (module, *within) if isinstance(one, nn.Conv2d)),
        set(),
    )
