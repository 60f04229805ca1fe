"""Read the forward of somebody's block as a graph of module calls, or say why that cannot be trusted.

``torch.fx`` evaluates the Python of a forward once, with proxies for tensors. What it cannot see it silently bakes in:
a random number drawn by Python, a branch on ``self.training``, a global. So a forward is traced only if every name in
its code is an attribute of the block or one of a few known functions, and only if training and evaluation give the
same graph.
"""

from __future__ import annotations

import dis
import inspect
import types

from torch import fx, nn

#: Names that a traceable forward may use beside attributes of the block.
_KNOWN = frozenset(
    "torch nn F functional Tensor relu relu_ add add_ cat flatten mean size shape view reshape max_pool2d avg_pool2d "
    "adaptive_avg_pool2d".split()
)


class Untraceable(Exception):
    """Why a forward was not read; the text is shown to the user."""


class _ShallowTracer(fx.Tracer):
    """Every module is a leaf except the block itself and plain Sequentials with convolutions of their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential or not any(isinstance(child, nn.Conv2d) for child in m)


def check_names(block: nn.Module) -> None:
    """Raise :class:`Untraceable` if the forward's code uses a name that tracing could bake in."""
    code = getattr(type(block).forward, "__code__", None)
    if not isinstance(code, types.CodeType):
        raise Untraceable("its forward is not a Python function")
    if code.co_freevars or code.co_cellvars or any(isinstance(c, types.CodeType) for c in code.co_consts):
        raise Untraceable("its forward uses super() or an inner function")
    if code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR):
        raise Untraceable("its forward takes *args or yields")
    unknown = [name for name in code.co_names if name not in _KNOWN and not _is_plain_attribute(block, name)]
    if unknown:
        raise Untraceable(f"its forward uses {', '.join(sorted(unknown))}, which may change from call to call")


def _is_plain_attribute(block: nn.Module, name: str) -> bool:
    """Modules, None and constants; not methods, whose code nobody looked at."""
    if name == "training":
        return True
    value = getattr(block, name, inspect.Parameter.empty)
    return value is None or isinstance(value, nn.Module | bool | int | float | str)


def trace(block: nn.Module) -> fx.Graph:
    """The graph of `block`'s forward, the same in training and evaluation.

    Raises:
        Untraceable: with the reason.
    """
    check_names(block)
    was_training, graphs = block.training, []
    try:
        for mode in (True, False):
            block.training = mode  # of the block alone; its children are leaves
            graphs.append(_ShallowTracer().trace(block))
    except Exception as error:  # any Python can be in a forward; whatever it raises means "not traced"
        raise Untraceable(f"its forward could not be traced ({type(error).__name__})") from error
    finally:
        block.training = was_training
    if [_signature(node) for node in graphs[0].nodes] != [_signature(node) for node in graphs[1].nodes]:
        raise Untraceable("its forward branches on self.training")
    graph = graphs[0]
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise Untraceable("its forward takes more than one argument")
    if any(node.op == "get_attr" for node in graph.nodes):
        raise Untraceable("its forward uses parameters or constants of its own")
    return graph


def _signature(node: fx.Node) -> tuple[str, str, str, str]:
    return node.op, str(node.target), str(node.args), str(node.kwargs)


def adds_in_place(block: nn.Module) -> bool:
    """Whether the forward adds with ``+=``, which ``torch.fx`` records as ``+``: the sum then keeps its dtype."""
    code = type(block).forward.__code__
    return any(
        i.opname == "INPLACE_ADD" or (i.opname == "BINARY_OP" and i.argrepr == "+=") for i in dis.get_instructions(code)
    )


#: Attributes that say nothing about the forward: ``torch.compile(block)`` leaves the second on the block.
_NOT_READ = ("training", "_is_torch_compile")


def state_of(block: nn.Module) -> tuple:
    """What the traced graph depends on: which children exist, and the constants a branch could have read."""
    children = tuple((name, child is None) for name, child in block._modules.items())
    constants = tuple(
        (key, value)
        for key, value in block.__dict__.items()
        if key not in _NOT_READ and (value is None or isinstance(value, bool | int | float | str))
    )
    return children, constants
