"""Calls that are known to run wholly in stock operations, by the plan's choice: their modules run stock's forward.

The stock forward is right in every state that a module can be in, so such a call proves nothing, and costs what stock
costs. The key only says when the plan would choose the same again; whatever it does not name (a weight of another shape
in an old one's place) may miss a gain, never a result.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..backends import current, precision
from ..blocks import runtime
from ..blocks.site import Site
from ..plan import choose, keys, measured
from .swap import STATE

_LIMIT = 64  # keys of a module after which they are collected anew


class _Kept(NamedTuple):
    """What is known of a module."""

    children: tuple[nn.Module | None, ...]  # as they were
    norms: tuple[nn.Module, ...]
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
    """What is known of `module`, as long as its children are what they were."""
    kept, now = _kept.get(module), module._modules
    same = kept is not None and len(now) == len(kept.children) and all(map(operator.is_, now.values(), kept.children))
    return kept if same else None


def _key(kept: _Kept, module: nn.Module, x: torch.Tensor, part: object) -> tuple | None:
    """All that decides whether the plan leaves a call to stock; None where it must be asked."""
    if choose.is_directed() or not x.is_cpu:
        return None
    wanting, state = kept.parameters if torch.is_grad_enabled() else (), module.__dict__.get(STATE)
    return (
        part,
        x.shape,
        x.dtype,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        current(),
        getattr(state, "backend", ""),
        precision.of(getattr(state, "precision", "default")),
        keys.threads(),
        measured.changes(),
        module.training,
        *[bool(norm.training) for norm in kept.norms],
        *[getattr(own.get("weight"), "requires_grad", False) for own in wanting],
    )


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


def note(module: nn.Module, sites: Sequence[Site], x: object, before: Ran, part: object = None) -> bool:
    """Note that `module`, whose programs are `sites`, ran on `x`, if the plan has left all to stock since `before`.

    Returns whether it has. What kept one from running else, a hook or a mode, may be gone the next time.
    """
    known = before.since() == (0, 0) and not torch.compiler.is_compiling()
    if known:
        keep(module, sites, x, part)
    return known


def keep(module: nn.Module, sites: Sequence[Site], x: object, part: object) -> None:
    """Keep what is known of a call: :func:`is_known` is true of the next that is like it."""
    if type(x) is not torch.Tensor or any(site.survivors and site.drop_path is not None for site in sites):
        return  # where its drop path draws, it runs on other samples than stock's forward does
    kept = _current(module)
    if kept is None or len(kept.keys) >= _LIMIT:
        parameters = tuple(conv._parameters for site in sites for conv in site.convolutions)
        norms = tuple(norm for site in sites for norm in site.norms)
        _kept[module] = kept = _Kept(tuple(module._modules.values()), norms, parameters, set())
    key = _key(kept, module, x, part)
    if key is not None:
        kept.keys.add(key)
