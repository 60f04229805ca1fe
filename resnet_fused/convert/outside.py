"""What a traced forward reads outside of its block, and whether that still is what it was.

A forward finds ``torch``, ``F`` or ``relu`` among the globals of its module, ``F.relu`` or ``torch.cat`` in PyTorch.
Anybody can bind these anew, a notebook's next cell as well as ``unittest.mock``; stock then calls the new ones. The
program of a block has the old ones in it, so every call compares.
"""

from __future__ import annotations

import builtins
import dis
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..blocks.proven import exchanged

_NAMESPACES = {"torch": torch, "torch.nn": nn, "torch.nn.functional": F}
#: The functions of PyTorch that a traceable forward may call, by namespace.
_CALLED = {
    "torch": ("relu", "relu_", "add", "cat", "flatten", "mean", "sigmoid"),
    "torch.nn.functional": (
        *("relu", "relu_", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "sigmoid", "hardsigmoid", "pad"),
        *("dropout", "dropout2d", "silu", "gelu", "leaky_relu", "hardswish", "relu6"),
    ),
}
_FUNCTIONS = {
    f"{path}.{name}": (_NAMESPACES[path], name, getattr(_NAMESPACES[path], name))
    for path, names in _CALLED.items()
    for name in names
}
#: Methods that an addition, an activation, a gate or a view may be in a forward, whatever it calls them by.
_METHODS = tuple(
    (torch.Tensor, name, getattr(torch.Tensor, name))
    for name in (
        "__add__ __iadd__ add add_ relu relu_ mean flatten view reshape size __mul__ amax expand_as sigmoid squeeze "
        "unsqueeze transpose"
    ).split()
)
_KNOWN = {
    **_NAMESPACES,
    **{path: function for path, (_, _, function) in _FUNCTIONS.items()},
    "builtins.getattr": getattr,
}
_NAMES = {"nn", "functional", "Tensor", "shape", *(name for _, name, _ in (*_FUNCTIONS.values(), *_METHODS))}


def path_of(value: object) -> str:
    """The name of a namespace or function of PyTorch that a traceable forward may use; empty for all else."""
    return next((path for path, known in _KNOWN.items() if known is value), "")


def global_of(function: types.FunctionType, name: str) -> object:
    """What a function finds under the name of a global: its module's, or Python's own."""
    return function.__globals__.get(name, getattr(builtins, name, None))


def is_known(name: str) -> bool:
    """Whether a traceable forward may read `name` of PyTorch's namespaces or of tensors: nobody replaced it."""
    return name in _NAMES and not exchanged(at for at in (*_FUNCTIONS.values(), *_METHODS) if at[1] == name)


def called(node: fx.Node) -> str:
    """The name of the function or method that a node of a traced forward calls; empty where it does something else."""
    if node.op == "call_method":
        return node.target
    return node.target.__name__ if node.op == "call_function" else ""


class Outside(NamedTuple):
    """What a forward reads outside, as names of PyTorch's: plain data."""

    globals: tuple[str, ...]  # what they are, in the order of :func:`globals_reader`
    functions: tuple[str, ...]  # that it may call; more of them do no harm

    def is_kept(self, reader: Callable[[], tuple | None]) -> bool:
        """Whether all of it is what it was; `reader` is that of the same forward."""
        found = reader()
        if found is None or len(found) != len(self.globals):
            return False
        for path, value in zip(self.globals, found, strict=True):
            if value is not _KNOWN[path]:
                return False
        if exchanged([_FUNCTIONS[path] for path in self.functions]):
            return False
        return torch.compiler.is_compiling() or not exchanged(_METHODS)  # which it calls by its own tables


def read_by(function: types.FunctionType) -> Outside:
    """What `function`, a forward that may be traced, reads outside of its block."""
    names = set(function.__code__.co_names)
    return Outside(
        tuple(path_of(global_of(function, name)) for name in _globals_of(function)),
        tuple(path for path, (_, name, _) in _FUNCTIONS.items() if name in names),
    )


def _globals_of(function: types.FunctionType) -> list[str]:
    found = [step.argval for step in dis.get_instructions(function) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return list(dict.fromkeys(found))


def globals_reader(function: types.FunctionType) -> Callable[[], tuple | None]:
    """A function that returns what `function` finds now in its globals, None where one is missing.

    It is code in the same globals, so that ``torch.compile`` guards what it reads, and nothing else of them.
    """
    names = "".join(f"{name}, " for name in _globals_of(function))
    source = f"def reader():\n    try:\n        return ({names})\n    except NameError:\n        return None"
    code = next(const for const in compile(source, __file__, "exec").co_consts if isinstance(const, types.CodeType))
    return types.FunctionType(code, function.__globals__)
