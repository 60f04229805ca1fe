"""What a call of an op allocates and starts, found out once for all calls of its form (:mod:`..met`).

The op's host code runs on meta tensors and is listened to: where it only allocates, and starts kernels on its
arguments and on what it allocated, nothing of it depends on more than the form. A plan then does the same by three
loops, without checks, tilings or dictionaries of its own. Host code that does anything else, such as to copy strided
parameters or to fill with zeros, has no plan and runs every time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from .. import cards
from . import bound, trace

Tensor = torch.Tensor
aten = torch.ops.aten
_ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class _Listener(TorchDispatchMode):
    """Whether nothing but allocations was dispatched."""

    only_allocates = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.only_allocates = self.only_allocates and func._overloadpacket in _ALLOCATIONS
        return func(*args, **(kwargs or {}))


class _Start(NamedTuple):
    """One launch: the kernel, its positional arguments as places of a list of tensors and constants, and the rest."""

    kernel: object
    programs: int
    arguments: Callable  # list -> tuple
    meta: dict


class Plan:
    """A callable: arguments in one tuple -> results."""

    def __init__(self, start: Callable, made: list[tuple], constants: list, starts: list[_Start], results: Callable):
        """`start`: :func:`.common.start`, looked up at every call. `made`: shape, strides, dtype of allocations."""
        self.start, self.made, self.constants, self.starts, self.results = start, made, constants, starts, results

    def __call__(self, given: tuple):
        device = given[0].device
        made = [torch.empty_strided(*form, dtype=dtype, device=device) for *form, dtype in self.made]
        all_of_them = [*given, *made, *self.constants]
        start = self.start()
        for kernel, programs, arguments, meta in self.starts:
            start(kernel, programs, *arguments(all_of_them), **meta)
        return self.results(all_of_them)

    def write(self, graph: fx.Graph, given: list, device: torch.device) -> object:
        """The same as nodes of `graph`, from those of the arguments; returns those of the results."""

        def empty(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
            return graph.call_function(torch.empty_strided, (shape, stride), {"dtype": dtype, "device": device})

        constants = [empty(c.shape, c.stride(), c.dtype) if isinstance(c, Tensor) else c for c in self.constants]
        all_of_them = [*given, *(empty(*form) for form in self.made), *constants]
        for start in self.starts:
            graph.call_function(self._launcher(*start), start.arguments(all_of_them))
        return self.results(all_of_them)

    def _launcher(self, kernel: object, programs: int, _: Callable, meta: dict) -> Callable:
        """A function that starts a kernel on its arguments, and carries its name."""

        def launch(*arguments) -> None:
            self.start()(kernel, programs, *arguments, **meta)

        launch.__name__, launch.__module__ = kernel.fn.__name__, __name__
        return launch


def of_call(run: Callable, start: Callable, args: tuple, kwargs: dict) -> Plan | None:
    """The plan of calls like this one of an op's host code `run`; None where it has none.

    Args:
        start: returns the function that starts kernels.
    """
    given = (*args, *kwargs.values())
    tensors = [t for t in given if isinstance(t, Tensor)]
    if any(t.device != tensors[0].device for t in tensors):  # which host code refuses, in its words
        return None
    twins = [trace.on_meta(value) for value in given]
    names = tuple(kwargs)
    try:
        with _Listener() as listener:
            call = twins[: len(args)], dict(zip(names, twins[len(args) :], strict=True))
            launches, results = trace.listened(run, *call, cards.of(tensors[0].device))
    except RuntimeError:  # so will the call itself, about its own tensors
        return None
    return _planned(start, twins, launches, results, tensors[0].device) if listener.only_allocates else None


def _planned(start: Callable, twins: list, launches: list[trace.Launch], results, device: torch.device) -> Plan:
    places = {id(twin): i for i, twin in enumerate(twins) if isinstance(twin, Tensor)}
    many = results if isinstance(results, tuple) else () if results is None else (results,)
    values = [value for launch in launches for value in launch.positional]
    fresh = {id(t): t for t in (*values, *many) if isinstance(t, Tensor) and id(t) not in places}
    made = [t for t in fresh.values() if t.numel()]
    empty = [t for t in fresh.values() if not t.numel()]  # nothing can be written to those: one each does for all calls
    places |= {id(t): len(twins) + i for i, t in enumerate(made)}
    constants = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in empty]
    places |= {id(t): len(twins) + len(made) + i for i, t in enumerate(empty)}

    def place(value) -> int:
        if isinstance(value, Tensor):
            return places[id(value)]
        constants.append(value)
        return len(twins) + len(made) + len(constants) - 1

    starts = []
    for launch in launches:
        pick = operator.itemgetter(*map(place, launch.positional))  # of two or more: every kernel has a result
        meta = launch.named | launch.settings | {"bound": bound.Bound(launch.kernel)}
        starts.append(_Start(launch.kernel, launch.programs, pick, meta))
    return Plan(
        start, [(t.shape, t.stride(), t.dtype) for t in made], constants, starts, _picker(many, places, results)
    )


def _picker(many: tuple, places: dict[int, int], results) -> Callable:
    if results is None:
        return lambda values: None
    pick = operator.itemgetter(*(places[id(t)] for t in many))
    return pick if len(many) != 1 or not isinstance(results, tuple) else lambda values: (pick(values),)
