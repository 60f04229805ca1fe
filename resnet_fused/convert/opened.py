"""Modules of others' classes whose forward is bypassed: what was read of it, and whether it still is what was read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..blocks import proven
from ..blocks.layers import hooked
from .instructions import Opened
from .outside import globals_reader, read_by
from .swap import is_subclassed, stock_class
from .trace import Untraceable, fingerprint, names_read, state_of, value_of


class _Class(NamedTuple):
    """What was read of a class whose forward is bypassed."""

    methods: tuple[tuple[str, object], ...]
    code: str
    reader: Callable[[], tuple | None]


_read: dict[type, _Class] = {}


def _look(cls: type) -> _Class | None:
    """What there is of `cls`, as it was at the first look; none is taken in a graph."""
    if cls not in _read and not torch.compiler.is_compiling():
        methods = tuple((name, getattr(cls, name)) for name in ("forward", *proven.CALL))
        _read[cls] = _Class(methods, fingerprint(cls.forward), globals_reader(cls.forward))
    return _read.get(cls)


def read(name: str, module: nn.Module) -> Opened:
    """What `module`, called `name`, must stay for its forward to be bypassed.

    Raises:
        Untraceable: it cannot be, with the reason.
    """
    cls = stock_class(module)
    if is_subclassed(module) or any(getattr(cls, m) is not getattr(nn.Module, m) for m in proven.CALL):
        raise Untraceable("it is called in its own way")
    traced = state_of(module, names_read(module, cls))
    return Opened(name, cls.__name__, _look(cls).code, traced, read_by(cls.forward))


def obstacle(module: nn.Module, read: Opened) -> str:
    """Why `module` must be called as a whole; empty if its forward may be bypassed."""
    cls, own = stock_class(module), module.__dict__
    alike = cls.__name__ == read.kind and not is_subclassed(module)
    if not alike or (known := _look(cls)) is None or known.code != read.code:
        return f"{read.name} is another module than was read by fuse()"
    if hooked(module):
        return f"hooks on {read.name}"
    for method, function in known.methods:
        if getattr(cls, method) is not function or method in own:
            return f"{method} of {read.name} was replaced"
    if own.get("_compiled_call_impl") is not None or not read.outside.is_kept(known.reader):
        return f"{read.name} runs other code than was read by fuse()"
    if any(value_of(module, name) != value for name, value in read.traced):
        return f"what the forward of {read.name} reads was changed after fuse()"
    return ""
