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
from ..blocks.site import find
from ..steps.program import Addition, Convolution, Pooling
from .instructions import Form, Ref, ShapeCall, StockCall

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
)  # fmt: skip
_FUNCTIONS = ("add", "add_", "iadd", "relu", "relu_")  # functions and methods that are passes


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


class Own:
    """What counts for a module's row: everything below it but modules with a row of their own."""

    def __init__(self, module: nn.Module, others: set[str]) -> None:
        self.module, self.others = module, others

    def convolutions(self) -> int:
        return sum(isinstance(module, nn.Conv2d) for _, module in self._walk(self.module, ""))

    def passes(self, but: Collection[str] = ()) -> int:
        """Norms and activations that are modules, without those named `but`."""
        return sum(passes_of(module) for name, module in self._walk(self.module, "") if name not in but)

    def _walk(self, module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        yield name, module
        if passes_of(module):  # what is in a norm, such as its activation, counts with it
            return
        for key, child in module.named_children():
            below = join(name, key)
            if below not in self.others:
                yield from self._walk(child, below)


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


def of_form(own: Own, form: Form) -> tuple[Share, Share]:
    """Convolutions and passes of a module that runs `form`."""
    nodes = [node for shape in form.shapes for node in shape.program.nodes]
    convolutions = sum(isinstance(node, Convolution) for node in nodes)
    fused = sum(1 + node.relu for node in nodes if not isinstance(node, Convolution | Pooling))
    names, stock = {name for shape in form.shapes for name in shape.modules}, 0
    for call in form.calls:
        if isinstance(call, StockCall) and call.op != "call_module":
            stock += getattr(call.target, "__name__", call.target) in _FUNCTIONS
        elif isinstance(call, StockCall) and (passes := passes_of(find(own.module, call.target))):
            stock += passes
            names.add(call.target)
    stock += own.passes(but=names)
    return Share(convolutions, own.convolutions()), Share(fused, fused + stock)


def unpaired(module: nn.Module, form: Form) -> str:
    """The convolutions and batch norms of `form` that stay stock for want of each other; empty if there are none."""
    stock = {call.output: call for call in form.calls if isinstance(call, StockCall) and call.op == "call_module"}
    modules = {output: find(module, call.target) for output, call in stock.items()}
    batch_norms = {output for output, found in modules.items() if found is not None and not norms.why_not(found)}
    before = {arg.name for output in batch_norms for arg in _refs(stock[output])}
    convs = [stock[o].target for o, m in modules.items() if isinstance(m, nn.Conv2d) and o not in before]
    after_conv = {o for o in batch_norms if any(isinstance(modules.get(a.name), nn.Conv2d) for a in _refs(stock[o]))}
    lone = [call.target for output, call in stock.items() if output in batch_norms - after_conv]
    texts = [f"no batch norm right behind {_listed(convs)}"] if convs else []
    texts += [f"no convolution right before {_listed(lone)}"] if lone else []
    return ", ".join(texts)


def _refs(call: StockCall) -> list[Ref]:
    """The values that a call of a module reads."""
    return [arg for arg in call.args if isinstance(arg, Ref)]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def describe(form: Form) -> str:
    """A form in words, e.g. ``conv1-bn1-relu-conv2-bn2 + downsample -> relu``."""
    return ", ".join(
        _describe(call.shape, call.inputs)
        if isinstance(call, ShapeCall)
        else f"[{call.target if isinstance(call.target, str) else call.target.__name__}]"
        for call in form.calls
    )


def _describe(shape: Shape, inputs: tuple[str, ...]) -> str:
    """A program in words, from its end along what its additions take first; `inputs`: names of the first values."""
    program, names, text = shape.program, (*inputs, *shape.names), ""
    value = program.output
    while value >= program.inputs:
        node = program.maker(value)
        relu = not isinstance(node, Convolution | Pooling) and node.relu
        own = f"-{names[value]}" + "-relu" * relu
        if isinstance(node, Addition):
            other = names[node.other] or "sum"
            if node.other >= program.inputs:
                other = other.rpartition(".")[0] or other
            own = f" * {shape.drop_path}" * node.sampled + f" + {other}" + " -> relu" * relu
        text, value = own + text, node.reads[0]
    return text.removeprefix("-")
