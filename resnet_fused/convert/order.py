"""What may run before a program that stood inside it: the proof that fusing a program re-orders nothing that matters.

A program runs where its last node was, after all that stood between its nodes. Its input is thus read later than in
stock, and so are the random numbers of its drop path drawn. That is the same only if nothing in between

* writes to the program's input, or to what may share memory with it;
* calls a module of the program, or one that holds such a module;
* draws random numbers, where the program does.

Of a module that is not known here all of this is assumed: that it writes to its arguments, returns them and draws.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..blocks import proven

#: Modules that make a new tensor from their argument; those with a true ``inplace`` write to it.
_FRESH = (
    nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d, nn.Upsample, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
)  # fmt: skip
_FRESH_FOREIGN = frozenset({("timm.layers.pool2d_same", "AvgPool2dSame"), ("timm.layers.blur_pool", "BlurPool2d")})
_METHODS = frozenset({"forward", "_conv_forward", "_check_input_dim", "__call__", "_call_impl"})
_DROPOUTS = (nn.Dropout, nn.Dropout2d)  # in evaluation they return their argument
#: What calls of these classes ran when this package was imported.
_RAN = {
    cls: tuple((name, getattr(cls, name)) for name in sorted(_METHODS) if hasattr(cls, name))
    for cls in (*_FRESH, *_DROPOUTS, nn.Identity, nn.Sequential)
}

_FRESH_FUNCTIONS = (
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.cat, torch.mean, F.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d,
)  # fmt: skip
_WRITING_FUNCTIONS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.relu_, F.relu_)
_RELUS = (F.relu, torch.relu)
_FRESH_METHODS = frozenset({"add", "relu", "mean"})
_VIEWS = frozenset({"flatten", "view", "reshape", "size", "shape"})


class Effect(NamedTuple):
    """What running a node does beside making a value."""

    shares: bool  # its result may be its argument's memory
    writes: bool  # to its first argument
    draws: bool  # random numbers


_NONE, _SHARES = Effect(False, False, False), Effect(True, False, False)
_WRITES, _UNKNOWN = Effect(True, True, False), Effect(True, True, True)


def module_effect(module: nn.Module) -> Effect:
    """What calling `module` does, its hooks not counted."""
    if any(name in _METHODS for name in module.__dict__):
        return _UNKNOWN
    if any(getattr(type(module), name) is not method for name, method in _RAN.get(type(module), ())):
        return _UNKNOWN
    if type(module) is nn.Identity:
        return _SHARES
    if type(module) in _DROPOUTS:
        return Effect(True, bool(module.inplace), True)
    if type(module) in _FRESH or proven.kind(module) in _FRESH_FOREIGN:
        return _WRITES if getattr(module, "inplace", False) else _NONE
    if type(module) is nn.Sequential:
        return Effect(*map(any, zip(_NONE, *(module_effect(child) for child in module), strict=True)))
    return _UNKNOWN


def _effect(block: nn.Module, node: fx.Node) -> Effect:
    if node.op in ("placeholder", "output"):
        return _NONE
    if node.op == "call_module":
        return module_effect(block.get_submodule(node.target))
    if node.op == "call_method":
        return _NONE if node.target in _FRESH_METHODS else _SHARES if node.target in _VIEWS else _WRITES
    if node.target in _FRESH_FUNCTIONS:
        return _NONE
    if node.target in _RELUS:
        inplace = node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False)
        return _WRITES if inplace else _NONE
    if node.target in _WRITING_FUNCTIONS:
        return _WRITES
    return _SHARES if node.target in (torch.flatten, operator.getitem, getattr) else _UNKNOWN


class Order:
    """The effects of one graph's nodes, and who may share memory with whom."""

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self.block, self.nodes = block, list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.effects = {node: _effect(block, node) for node in self.nodes}
        self.memory: dict[fx.Node, frozenset[fx.Node]] = {}  # whose memory a value may be
        for node in self.nodes:
            shared = [self.memory[arg] for arg in node.all_input_nodes] if self.effects[node].shares else []
            self.memory[node] = frozenset({node}).union(*shared)

    def _written(self, node: fx.Node) -> frozenset[fx.Node]:
        if not self.effects[node].writes:
            return frozenset()
        return frozenset().union(*(self.memory[arg] for arg in node.all_input_nodes))

    def between(self, inside: list[fx.Node]) -> list[fx.Node]:
        """The nodes that stand between those of a program and are none of them."""
        places = [self.place[node] for node in inside]
        taken = set(inside)
        return [node for node in self.nodes[min(places) : max(places)] if node not in taken]

    def obstacle(self, inside: list[fx.Node], source: fx.Node, draws: bool) -> str:
        """Why the nodes `inside` may not run where the last of them stands; empty if they may.

        `source`: the value that they read first. `draws`: whether one of them draws random numbers.
        """
        for node in self.between(inside):
            if self._written(node) & self.memory[source]:
                return f"{node.name} may change the input of what runs before it"
            if draws and self.effects[node].draws:
                return f"{node.name} may draw random numbers before drop path does"
        return self._shared_module(inside)

    def _shared_module(self, inside: list[fx.Node]) -> str:
        """Whether a module with parameters or buffers of its own is also run by another node."""
        own = [id(self.block.get_submodule(node.target)) for node in inside if self._has_state(node)]
        if len(set(own)) < len(own):
            return "a convolution or batch norm is called twice"
        for node in self.nodes:
            if node.op != "call_module" or node in inside:
                continue
            module = self.block.get_submodule(node.target)
            if any(id(inner) in own for inner in module.modules()):
                return f"a convolution or batch norm is called by {node.name} as well"
        return ""

    def _has_state(self, node: fx.Node) -> bool:
        return node.op == "call_module" and any(True for _ in self._tensors(node))

    def _tensors(self, node: fx.Node) -> Iterator[torch.Tensor]:
        module = self.block.get_submodule(node.target)
        yield from module.parameters()
        yield from module.buffers()
