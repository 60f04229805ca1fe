"""Read the forward of somebody's block as a graph of module calls, or say why that cannot be trusted.

``torch.fx`` evaluates the Python of a forward once, with proxies for tensors. What it cannot see it silently bakes in:
a random number drawn by Python, a branch on ``self.training``, a global. So a forward is traced only if its bytecode
reads nothing but children and constants of the block and a few functions of PyTorch, writes nothing, and gives the same
graph in training and evaluation.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import operator
import types
from collections.abc import Callable

from torch import fx, nn

from . import dropouts, outside

#: Instructions that leave something behind, or run code that nobody looked at.
_REFUSED = (
    ("STORE_ATTR", "sets an attribute"),
    ("DELETE_ATTR", "deletes an attribute"),
    ("STORE_GLOBAL", "sets a global"),
    ("DELETE_GLOBAL", "deletes a global"),
    ("STORE_SUBSCR", "writes into a tensor by index"),
    ("DELETE_SUBSCR", "deletes an item"),
    ("IMPORT_NAME", "imports"),
    ("MAKE_FUNCTION", "uses super() or an inner function"),
    ("LOAD_SUPER", "uses super() or an inner function"),
)


class Untraceable(Exception):
    """Why a forward was not read; the text is shown to the user."""


class _Proxy(fx.Proxy):
    """Records in-place operators as what they are, where ``torch.fx`` records the others."""

    def _write(self, operation: Callable, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    setattr(_Proxy, f"__i{_name}__", functools.partialmethod(_Proxy._write, getattr(operator, f"__i{_name}__")))


class _ShallowTracer(fx.Tracer):
    """Traces `forward`; every module is a leaf but the block itself and plain Sequentials with own convolutions.

    `whole`: these are leaves too.
    """

    def __init__(self, forward: types.FunctionType, whole: bool) -> None:
        super().__init__()
        self.forward, self.whole = forward, whole

    def create_args_for_root(self, root_fn: Callable, *args, **kwargs):
        return super().create_args_for_root(self.forward, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.whole or type(m) is not nn.Sequential or not any(isinstance(child, nn.Conv2d) for child in m)


def names_read(block: nn.Module, cls: type) -> list[str]:
    """The attributes of `block` that the forward of `cls`, its stock class, reads; children among them.

    Raises:
        Untraceable: the forward's code does what tracing could bake in or leave out.
    """
    code = getattr(cls.forward, "__code__", None)
    if not isinstance(code, types.CodeType) or "forward" in block.__dict__:
        raise Untraceable("its forward is not a method of its class")
    if cls.__getattr__ is not nn.Module.__getattr__ or cls.__getattribute__ is not object.__getattribute__:
        raise Untraceable("its class looks attributes up in its own way")
    if code.co_freevars or code.co_cellvars or any(isinstance(c, types.CodeType) for c in code.co_consts):
        raise Untraceable("its forward uses super() or an inner function")
    if code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE):
        raise Untraceable("its forward takes *args or yields")
    found: dict[str, tuple | None] = {}
    unsure = {_OTHER, _ABSENT}
    unknown: set[str] = set()
    owner = ""  # what the last instruction left on the stack: "self", "child", or nothing that is known
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG")]
    for place, step in enumerate(steps):
        for prefix, what in _REFUSED:
            if step.opname.startswith(prefix):
                raise Untraceable(f"its forward {what}")
        before, owner = owner, ""
        if step.opname.startswith("LOAD_FAST"):
            last = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            owner = "self" if last == code.co_varnames[0] else ""
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = outside.global_of(cls.forward, step.argval)
            name = _got(code, steps[place + 1 : place + 3]) if value is getattr else ""
            if name and value_of(block, name) != _OTHER:
                found[name] = _ABSENT  # where it is: the code behind asks first
            elif value is getattr or not outside.path_of(value):
                unknown.add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if before == "child":
                raise Untraceable(f"its forward reads {step.argval} of a child")
            if before != "self":
                unknown |= set() if outside.is_known(step.argval) else {step.argval}
            elif step.argval != "training" and value_of(block, step.argval) in unsure - {found.get(step.argval)}:
                unknown.add(step.argval)  # not a module, None or constant: a method, say, whose code nobody looked at
            else:
                found[step.argval] = None
                owner = "child" if isinstance(block._modules.get(step.argval), nn.Module) else ""
    if unknown:
        raise Untraceable(f"its forward uses {', '.join(sorted(unknown))}, which may change from call to call")
    return list(found)


def _got(code: types.CodeType, behind: list[dis.Instruction]) -> str:
    """The attribute of the block that a call of ``getattr`` asks for by a constant name; empty for all other calls."""
    if [step.opname[:9] for step in behind] != ["LOAD_FAST", "LOAD_CONS"]:
        return ""
    owner, name = (step.argval for step in behind)
    return name if owner == code.co_varnames[0] and isinstance(name, str) and name != "training" else ""


_OTHER, _ABSENT = ("something else", ""), ("absent", "")


def value_of(block: nn.Module, name: str) -> tuple[str, object]:
    """What a forward finds in ``self.name``: a constant, that there is a child or None; all other things are alike."""
    if name in block.__dict__:
        value = block.__dict__[name]
    elif hasattr(type(block), name):
        value = getattr(type(block), name)
    elif name in block._modules:
        value = block._modules[name]
        return ("none", None) if value is None else ("child", "")
    else:
        return _OTHER if name in block._parameters or name in block._buffers else _ABSENT
    if value is None:
        return "none", None
    return (type(value).__name__, value) if isinstance(value, bool | int | float | str) else _OTHER


def state_of(block: nn.Module, names: list[str]) -> tuple:
    """What the traced graph depends on: of all that the forward reads, which children exist, and the constants."""
    return tuple((name, value_of(block, name)) for name in names if name != "training")


def fingerprint(function: object) -> str:
    """A digest of a function's code: equal where two functions do the same with the same names."""
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    parts = (code.co_code, code.co_names, code.co_varnames, code.co_consts, code.co_flags)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def trace(block: nn.Module, cls: type, whole: bool = False) -> fx.Graph:
    """The graph of the forward of `cls`, the stock class of `block`, the same in training and evaluation.

    `whole`: no child's children are called in its place.

    Raises:
        Untraceable: with the reason.
    """
    names_read(block, cls)
    was_training, graphs = block.training, []
    try:
        for mode in (True, False):
            block.training = mode  # of the block alone; its children are leaves
            graphs.append(_ShallowTracer(cls.forward, whole).trace(block))
    except Exception as error:  # any Python can be in a forward; whatever it raises means "not traced"
        raise Untraceable(f"its forward could not be traced ({type(error).__name__})") from error
    finally:
        block.training = was_training
    dropouts.name_training(*graphs)
    if str(graphs[0]) != str(graphs[1]):
        raise Untraceable("its forward branches on self.training")
    graph = graphs[0]
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise Untraceable("its forward takes more than one argument")
    if any(node.op == "get_attr" for node in graph.nodes):
        raise Untraceable("its forward uses parameters or constants of its own")
    for node in graph.nodes:
        atoms = node.target.split(".") if node.op == "call_module" else []
        holders = (block.get_submodule(".".join(atoms[:i])) for i in range(1, len(atoms)))
        if any(type(holder) is not nn.Sequential for holder in holders):
            raise Untraceable("its forward runs a method of a child")
    return graph
