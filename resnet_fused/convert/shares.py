"""Count what a fused module runs fused: its convolutions and its passes over memory, by structure.

A pass is a norm, an activation, or an addition; additions and functional activations are known only where a forward was
read, that is of programs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from torch import nn

from ..blocks import norms
from ..blocks.shape import Shape
from ..steps.dense import KEPT
from ..steps.program import Addition, Averaging, Concatenation, Convolution, Node, Normalisation, Pooling
from .instructions import Form, GateCall, GatedSum, ShapeCall, StockCall

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
)  # fmt: skip
_NO_PASS = Concatenation | Convolution | Pooling | Averaging
#: Functions and methods that are passes.
_FUNCTIONS = ("add", "add_", "iadd", "relu", "relu_", "silu", "gelu", "leaky_relu", "hardswish", "relu6")


class Share(NamedTuple):
    """How many of all."""

    fused: int
    total: int

    def __str__(self) -> str:
        return f"{self.fused} of {self.total}"

    @classmethod
    def sum(cls, shares: Iterable[Share]) -> Share:
        shares = list(shares)
        return cls(sum(share.fused for share in shares), sum(share.total for share in shares))


def counted(module: nn.Module, rows: Collection[str], row: str, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What counts for a `row`, by name within it: everything in its module but what has another of the `rows`."""
    yield name, module
    if not passes_of(module):  # what is in a norm, such as its activation, counts with it
        for key, child in module.named_children():
            if join(row, below := join(name, key)) not in rows:
                yield from counted(child, rows, row, below)


def convolutions_in(own: dict[str, nn.Module]) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in own.values())


def passes_in(own: dict[str, nn.Module], but: Collection[str] = ()) -> int:
    """Norms and activations that are modules, without those named `but`."""
    return sum(passes_of(module) for name, module in own.items() if name not in but)


def passes_of(module: nn.Module | None) -> int:
    """Passes over memory that a module is, of itself."""
    if module is None:
        return 0
    if isinstance(module, _NORMS) or not norms.why_not(module):
        return 1 + (not isinstance(norms.activation_of(module), nn.Identity | None))
    return int(isinstance(module, _ACTIVATIONS))


def join(name: str, inner: str) -> str:
    """The name of a submodule's submodule."""
    return f"{name}.{inner}" if name and inner else name or inner


def of_form(own: dict[str, nn.Module], form: Form) -> tuple[Share, Share]:
    """Convolutions and passes of a module that runs `form`."""
    nodes = [node for shape in form.shapes for node in shape.program.nodes]
    convolutions = sum(isinstance(node, Convolution) for node in nodes)
    fused = sum(1 + bool(_activation(node)) for node in nodes if not isinstance(node, _NO_PASS))
    fused += sum(1 + call.relu for call in form.calls if isinstance(call, GatedSum))
    stock = [call for call in form.calls if isinstance(call, StockCall)]
    called = [call.target for call in stock if call.op == "call_module"]
    passes = sum(getattr(call.target, "__name__", call.target) in _FUNCTIONS for call in stock)
    passes += sum(passes_of(own.get(name)) for name in called)
    passes += passes_in(own, but={*called, *(name for shape in form.shapes for name in shape.modules)})
    return Share(convolutions, convolutions_in(own)), Share(fused, fused + passes)


def _activation(node: Node) -> str:
    """The activation in a node, in a word; empty where there is none."""
    if isinstance(node, _NO_PASS):
        return ""
    act = node.act if isinstance(node, Normalisation) else None
    return "relu" if node.relu else "" if act is None else str(act).replace(" ", "")


def describe(form: Form) -> str:
    """A form in words, e.g. ``conv1-bn1-relu-conv2-bn2 + downsample -> relu``."""
    return ", ".join(map(_describe_call, form.calls))


def _describe_call(call: ShapeCall | StockCall | GateCall | GatedSum) -> str:
    if isinstance(call, ShapeCall):
        return _describe(call.shape, call.inputs)
    if isinstance(call, GateCall):
        opaque = [f"[{_name(inner)}]" for inner in call.calls if inner.op == "call_module"]
        return f"{call.stock.target}: mean, {', '.join([*opaque, 'product'])}"
    if isinstance(call, GatedSum):
        gated = f"{call.inputs[0]} * {call.drop_path}" if call.drop_path else call.inputs[0]
        return f"{gated} + {call.inputs[1]}" + " -> relu" * call.relu
    return f"[{_name(call)}]"


def _name(call: StockCall) -> str:
    return call.target if isinstance(call.target, str) else call.target.__name__


def _describe(shape: Shape, inputs: tuple[str, ...]) -> str:
    """A program in words, from its end along what its additions take first; `inputs`: names of the first values."""
    program, names, text = shape.program, (*inputs, *shape.names), ""
    if program.dense:
        saves = "" if program.dense == KEPT else ", in backward computed again up to norm2"
        return f"{len(program.nodes) // 5} layers norm1-relu-conv1-norm2-relu-conv2 on one buffer{saves}"
    value = program.output
    while value >= program.inputs:
        node = program.maker(value)
        act = _activation(node)
        own = f"-{names[value]}" + (f"-{act}" if act else "")
        if isinstance(node, Addition):
            other = names[node.other] or "sum"
            if node.other >= program.inputs:
                other = other.rpartition(".")[0] or other
            own = f" * {shape.drop_path}" * node.sampled + f" + {other}" + " -> relu" * node.relu
        text, value = own + text, node.reads[0]
    return text.removeprefix("-")
