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
from collections.abc import Callable, Collection, Iterator

from torch import fx, nn

from ..blocks import proven
from ..blocks.layers import hooked
from . import dropouts, outside
from .swap import is_subclassed, stock_class

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
    """Traces `forward`; every module is a leaf but the block itself and those in `opened`."""

    def __init__(self, forward: types.FunctionType, opened: Collection[nn.Module]) -> None:
        super().__init__()
        self.forward, self.opened = forward, opened

    def create_args_for_root(self, root_fn: Callable, *args, **kwargs):
        return super().create_args_for_root(self.forward, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Of a module that is opened, the stock forward, also where it is fused."""
        return super().call_module(m, functools.partial(stock_class(m).forward, m), args, kwargs)


def opens(module: nn.Module) -> bool:
    """Whether a block's graph has what `module` calls in its place.

    That is so of a plain Sequential with convolutions, its own or those of what opens in it, and of a module with one
    convolution whose forward is a chain, its children one after the other and nothing else: timm's ``ConvNormAct``.
    """
    convolutions = sum(isinstance(child, nn.Conv2d) for child in module.children())
    if type(module) is nn.Sequential:
        return convolutions > 0 or any(map(opens, module))
    cls = stock_class(module)
    if convolutions != 1 or cls.__module__.startswith("torch.nn.") or hooked(module) or is_subclassed(module):
        return False
    if any(getattr(cls, name) is not getattr(nn.Module, name) or name in module.__dict__ for name in proven.CALL):
        return False
    try:
        before, *calls = trace(module, cls).nodes
    except Untraceable:
        return False
    for node in calls:
        if node.args != (before,) or node.kwargs or node.op not in ("call_module", "output"):
            return False
        before = node
    return any(isinstance(module.get_submodule(node.target), nn.Conv2d) for node in calls[:-1])


def _is_called_by_torch(module: nn.Module) -> bool:
    """Whether calling `module` is PyTorch's: what another ``__call__`` does beside, a graph has beside its node."""
    return getattr(type(module).__call__, "__module__", "").startswith("torch.")


def _opened(block: nn.Module) -> Iterator[nn.Module]:
    """What opens in `block` and in what opens there."""
    for child in filter(opens, block.children()):
        yield child
        yield from _opened(child)


def names_read(block: nn.Module, cls: type) -> list[str]:
    """The attributes of `block` that the forward of `cls`, its stock class, reads; children among them.

    Raises:
        Untraceable: the forward's code does what tracing could bake in or leave out.
    """
    if cls.forward is nn.Module.forward:
        raise Untraceable("it has no forward; whoever holds it calls its modules")
    code = getattr(cls.forward, "__code__", None)
    if not isinstance(code, types.CodeType) or "forward" in block.__dict__:
        raise Untraceable("its forward is not a method of its class")
    if cls.__getattr__ is not nn.Module.__getattr__ or cls.__getattribute__ is not object.__getattribute__:
        raise Untraceable("its class looks attributes up in its own way")
    if code.co_freevars or code.co_cellvars or any(isinstance(c, types.CodeType) for c in code.co_consts):
        raise Untraceable("its forward uses super() or an inner function")
    if code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE):
        raise Untraceable("its forward takes *args or yields")
    found: dict[str, None] = {}
    unknown: set[str] = set()
    owner = ""  # what the last instruction left on the stack: "self", "child", or nothing that is known
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG")]
    for index, step in enumerate(steps):
        for prefix, what in _REFUSED:
            if step.opname.startswith(prefix):
                raise Untraceable(f"its forward {what}")
        if code.co_varnames[0] in _stored(step):
            raise Untraceable("its forward gives self another meaning")
        before, owner = owner, ""
        if step.opname.startswith("LOAD_FAST"):
            last = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            owner = "self" if last == code.co_varnames[0] else ""
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = outside.global_of(cls.forward, step.argval)
            name = _asked_for(steps[index + 1 : index + 4], code.co_varnames[0]) if value is getattr else ""
            readable = value_of(block, name) != _OTHER if name else value is not getattr
            if not outside.path_of(value) or not readable:
                unknown.add(step.argval)
            found |= {name: None} if name else {}
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if before == "child":
                raise Untraceable(f"its forward reads {step.argval} of a child")
            if before != "self":
                unknown |= set() if outside.is_known(step.argval) else {step.argval}
            elif step.argval != "training" and value_of(block, step.argval) in _unread(step.argval, found):
                unknown.add(step.argval)  # not a module, None or constant: a method, say, whose code nobody looked at
            else:
                found[step.argval] = None
                owner = "child" if isinstance(block._modules.get(step.argval), nn.Module) else ""
    if unknown:
        raise Untraceable(f"its forward uses {', '.join(sorted(unknown))}, which may change from call to call")
    return list(found)


def _stored(step: dis.Instruction) -> tuple[str, ...]:
    """The local names that an instruction binds anew or takes away."""
    if not step.opname.startswith(("STORE_FAST", "DELETE_FAST")):
        return ()
    names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    return names[:1] if "LOAD" in step.opname else names


def _asked_for(steps: list[dis.Instruction], receiver: str) -> str:
    """The name in ``getattr(self, "name", default)`` by what is loaded for it; empty where it is anything else."""
    loads = [step.opname.startswith("LOAD_FAST") for step in steps] == [True, False, False]
    if not loads or steps[0].argval != receiver or any(not step.opname.startswith("LOAD_") for step in steps):
        return ""
    name = steps[1].argval if steps[1].opname.startswith("LOAD_CONST") else ""
    constant = steps[2].opname.startswith(("LOAD_CONST", "LOAD_SMALL_INT"))
    return name if constant and isinstance(name, str) and name != "training" else ""


_OTHER, _MISSING = ("something else", ""), ("nothing", "")


def value_of(block: nn.Module, name: str) -> tuple[str, object]:
    """What a forward finds in ``self.name``: a constant, that there is a child, None or nothing; all else is alike."""
    if name in block.__dict__:
        value = block.__dict__[name]
    elif hasattr(type(block), name):
        value = getattr(type(block), name)
    elif name in block._modules:
        value = block._modules[name]
        return ("none", None) if value is None else ("child", "")
    else:
        return _OTHER if name in block._parameters or name in block._buffers else _MISSING
    if value is None:
        return "none", None
    return (type(value).__name__, value) if isinstance(value, bool | int | float | str) else _OTHER


def _unread(name: str, found: Collection[str]) -> tuple:
    """Values of ``self.name`` that nobody may read; that there is none does no harm where getattr() has asked."""
    return (_OTHER,) if name in found else (_OTHER, _MISSING)


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
    opened = set() if whole else set(_opened(block))
    was_training, graphs = block.training, []
    try:
        for mode in (True, False):
            block.training = mode  # of the block alone; its children are leaves
            graphs.append(_ShallowTracer(cls.forward, opened).trace(block))
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
        holders = [block.get_submodule(".".join(atoms[:i])) for i in range(1, len(atoms))]
        if not opened.issuperset(holders):
            raise Untraceable("its forward runs a method of a child")
        if atoms and not _is_called_by_torch(block.get_submodule(node.target)):
            raise Untraceable(f"{node.target} has a __call__ of its own")
    return graph
