"""The instructions that a traced block becomes: plain data, that copies and pickles."""

from __future__ import annotations

import dataclasses

from torch import fx

from ..steps.layout import left
from .order import Effect


@dataclasses.dataclass(frozen=True)
class ChainCall:
    """Run fused: names of modules, and of the values read and written."""

    steps: tuple[tuple[str, str], ...]  # (convolution, norm)
    input: str
    output: str
    relu: bool
    residual: str | None = None
    inplace_add: bool = True
    shortcut: tuple[str, str] | None = None
    drop_path: str | None = None
    pool: str | None = None  # the max pool behind the last ReLU
    bypassed: tuple[tuple[str, str], ...] = ()  # modules that are not called either: name and class


@dataclasses.dataclass(frozen=True)
class StockCall:
    """Run as stock: one node of the traced graph."""

    op: str  # call_module, call_function, call_method
    target: object
    args: tuple  # value names wrapped in Ref, constants as they are
    kwargs: tuple[tuple[str, object], ...]
    output: str


@dataclasses.dataclass(frozen=True)
class Ref:
    """A value of the program, by name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Instructions in order, the input's name and the result: values wrapped in Ref, in whatever is returned."""

    calls: tuple[ChainCall | StockCall, ...]
    input: str
    result: object
    containers: tuple[tuple[str, int], ...]  # Sequentials whose children are called in their place, and their lengths
    between: tuple[
        tuple[str, str, Effect], ...
    ] = ()  # modules called before a chain that they stood in: name and class
    modules: tuple[str, ...] = ()  # names of all that are called or stood in for
    parents: tuple[str, ...] = ()  # names of all that hold these, the block itself left out

    @property
    def chains(self) -> list[ChainCall]:
        return [call for call in self.calls if isinstance(call, ChainCall)]


def plain(arg: object) -> object:
    """An argument of a node with names for nodes, in Python's own containers: ``torch.compile`` knows no others."""
    if isinstance(arg, fx.Node):
        return Ref(arg.name)
    if isinstance(arg, slice):
        return slice(plain(arg.start), plain(arg.stop), plain(arg.step))
    if isinstance(arg, dict):
        return {key: plain(value) for key, value in arg.items()}
    if isinstance(arg, tuple | list):
        return (tuple if isinstance(arg, tuple) else list)(map(plain, arg))
    return arg


def resolve(arg: object, values: dict[str, object]) -> object:
    """What :func:`plain` made an argument or a result of, with values in stock's layout for their names."""
    if isinstance(arg, Ref):
        values[arg.name] = left(values[arg.name])
        return values[arg.name]
    if isinstance(arg, slice):
        return slice(resolve(arg.start, values), resolve(arg.stop, values), resolve(arg.step, values))
    if isinstance(arg, dict):
        return {key: resolve(item, values) for key, item in arg.items()}
    if isinstance(arg, tuple | list):
        return type(arg)([resolve(item, values) for item in arg])
    return arg
