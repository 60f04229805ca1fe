"""The instructions that a traced block becomes: plain data, that copies and pickles."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Callable

from torch import fx

from ..blocks.shape import Shape
from ..steps.layout import left
from .order import Effect
from .outside import Outside

OUTDATED = "this model was fused by another version of resnet_fused, where unfuse(model) before saving makes it stock"


def __getattr__(name: str) -> object:
    """What states of other versions are made of, and whoever loads one asks for."""
    if name in ("ChainCall", "Program"):
        raise pickle.UnpicklingError(OUTDATED)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclasses.dataclass(frozen=True)
class ShapeCall:
    """Run fused: a program of modules, and the names of the values read and written."""

    shape: Shape
    inputs: tuple[str, ...]  # the program's input, and the residual from outside if it has one
    output: str


@dataclasses.dataclass(frozen=True)
class StockCall:
    """Run as stock: one node of the traced graph."""

    op: str  # call_module, call_function, call_method
    target: object
    args: tuple  # value names wrapped in Ref, constants as they are
    kwargs: tuple[tuple[str, object], ...]
    output: str

    @property
    def takes_one(self) -> bool:
        """Whether it is called with one value and nothing else."""
        return len(self.args) == 1 and isinstance(self.args[0], Ref) and not self.kwargs


@dataclasses.dataclass(frozen=True)
class GateCall:
    """Call a module that multiplies its input by what it makes of the means over pixels, see :mod:`.gates`."""

    stock: StockCall  # of the module as a whole
    kind: str  # its class
    code: str  # of its forward, see trace.fingerprint
    traced: tuple  # what that reads of the module, see trace.state_of
    outside: Outside  # and outside of it
    pool: str  # the child that makes the mean; empty: a function does
    source: str  # names of values within its forward: its input,
    mean: str  # the mean,
    keeps: bool  # which is [N, C, 1, 1], or [N, C]
    calls: tuple[StockCall, ...]  # what makes the factor of it
    factor: str
    input: str
    output: str
    summed: bool  # whether a GatedSum alone reads the output, which is not written then


@dataclasses.dataclass(frozen=True)
class GatedSum:
    """Add to the value of a gate, perhaps behind a drop path, perhaps with the ReLU behind it."""

    stock: tuple[StockCall, ...]  # the same, one by one
    inputs: tuple[str, str]  # the gated value, and what is added
    other_first: bool  # stock adds the gated value to the other
    relu: bool
    drop_path: str  # the module between, by which the gated value is multiplied for each sample; perhaps empty
    output: str


@dataclasses.dataclass(frozen=True)
class Opened:
    """A module of somebody's class whose children are called in its place, and what shows that they still may be."""

    name: str
    kind: str  # its class
    code: str  # of its forward, see trace.fingerprint
    traced: tuple  # what that reads of the module, see trace.state_of
    outside: Outside  # and outside of it


@dataclasses.dataclass(frozen=True)
class Ref:
    """A value of the program, by name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to run a forward: calls in order, the input's name and the result: values in Ref, in whatever returns."""

    calls: tuple[ShapeCall | StockCall | GateCall | GatedSum, ...]
    input: str
    result: object
    containers: tuple[tuple[str, int], ...]  # Sequentials whose children are called in their place, and their lengths
    #: Modules called before a program that they stood in: name, class and effect.
    between: tuple[tuple[str, str, Effect], ...]
    modules: tuple[str, ...]  # names of all that are called or stood in for
    opened: tuple[Opened, ...] = ()
    quiet: tuple[str, ...] = ()  # dropouts that are left out, see dropouts.decided_by: none of them may draw
    shapes: tuple[Shape, ...] = dataclasses.field(init=False)  # the programs among the calls
    first: int | None = dataclasses.field(init=False)  # which of these reads the input, if one does
    is_whole: bool = dataclasses.field(init=False)  # one program and nothing else, with the program's output as it is
    #: Values that only the call right behind reads, a module, a program or a gate: what is known of them stays true.
    passed: frozenset[str] = dataclasses.field(init=False, default=frozenset())

    def __post_init__(self) -> None:
        programs = [call for call in self.calls if isinstance(call, ShapeCall)]
        first = next((i for i, call in enumerate(programs) if call.inputs[0] == self.input), None)
        whole = len(self.calls) == len(programs) == 1 and self.result == Ref(self.calls[0].output)
        read = [name for call in self.calls for name in _read_by(call)] + [ref.name for ref in _refs(self.result)]
        passed = set()
        for call, following in itertools.pairwise(self.calls):
            takes = isinstance(following, ShapeCall | GateCall)
            takes = takes or (isinstance(following, StockCall) and following.takes_one)
            if takes and read.count(call.output) == 1 and call.output in _read_by(following):
                passed.add(call.output)
        shapes = tuple(call.shape for call in programs)
        self.__dict__.update(shapes=shapes, first=first, is_whole=whole, passed=frozenset(passed))  # frozen from here

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense block, see :mod:`.dense`."""
        return any(shape.program.dense for shape in self.shapes)

    @property
    def stood_in(self) -> set[str]:
        """The names of all modules that programs stand in for, and of what holds them."""
        holders = {name for name, _ in self.containers} | {module.name for module in self.opened}
        return {name for shape in self.shapes for name in shape.modules} | holders


def _read_by(call: ShapeCall | StockCall | GateCall | GatedSum) -> list[str]:
    """The names of the values that a call reads, one as often as it does."""
    if isinstance(call, ShapeCall | GatedSum):
        inner = [name for stock in getattr(call, "stock", ()) for name in _read_by(stock)]
        return [*call.inputs, *inner]
    if isinstance(call, GateCall):
        return [call.input]
    return [ref.name for ref in (*_refs(call.args), *_refs(call.kwargs))]


def _refs(arg: object) -> list[Ref]:
    found: list[Ref] = []
    _changed(arg, lambda item: found.append(item) if isinstance(item, Ref) else None)
    return found


def plain(arg: object) -> object:
    """An argument of a node with names for nodes."""
    return _changed(arg, lambda item: Ref(item.name) if isinstance(item, fx.Node) else item)


def resolve(arg: object, values: dict[str, object]) -> object:
    """What :func:`plain` made an argument or a result of, with values in stock's layout for their names."""

    def value(item: object) -> object:
        if not isinstance(item, Ref):
            return item
        values[item.name] = left(values[item.name])
        return values[item.name]

    return _changed(arg, value)


def _changed(arg: object, change: Callable[[object], object]) -> object:
    """`arg` with all items changed, in Python's own containers: ``torch.compile`` knows no others."""
    if isinstance(arg, slice):
        return slice(*[_changed(item, change) for item in (arg.start, arg.stop, arg.step)])
    if isinstance(arg, dict):
        return {key: _changed(item, change) for key, item in arg.items()}
    if isinstance(arg, tuple | list):
        return (tuple if isinstance(arg, tuple) else list)([_changed(item, change) for item in arg])
    return change(arg)
