"""What may run before a program that stood inside it: the proof that fusing a program re-orders nothing that matters.

A program runs where its last node was, after all that stood between its nodes. Its input is thus read later than in
stock, and so are the random numbers of its drop path drawn. That is the same only if nothing in between

* writes to the program's input, or to what may share memory with it;
* calls a module of the program, or one that holds such a module;
* draws random numbers, where the program does.

Of a module that is not known here all of this is assumed: that it writes to its arguments, returns them and draws.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import fx, nn

from ..blocks import proven
from .outside import called


class Effect(NamedTuple):
    """What running a node does beside making a value."""

    shares: bool  # its result may be its argument's memory
    writes: bool  # to its first argument
    draws: bool  # random numbers


_NONE, _SHARES = Effect(False, False, False), Effect(True, False, False)
_WRITES, _UNKNOWN = Effect(True, True, False), Effect(True, True, True)
#: Of the functions and methods that a traceable forward may call, by name.
_EFFECTS = {
    **dict.fromkeys("add sub mul truediv cat mean relu max_pool2d avg_pool2d adaptive_avg_pool2d".split(), _NONE),
    **dict.fromkeys("flatten view reshape size shape getitem getattr".split(), _SHARES),
    **dict.fromkeys("iadd isub imul itruediv add_ relu_".split(), _WRITES),
}


def module_effect(module: nn.Module) -> Effect:
    """What calling `module` does, its hooks not counted."""
    cls = type(module)
    foreign = proven.kind(module) in proven.FRESH_FOREIGN
    if proven.why_changed(module, None if foreign else cls):
        return _UNKNOWN
    if cls is nn.Identity:
        return _SHARES
    if cls in (nn.Dropout, nn.Dropout2d):  # in evaluation they return their argument
        return Effect(True, bool(module.inplace), True)
    if cls in proven.FRESH or foreign:
        return _WRITES if getattr(module, "inplace", False) else _NONE
    if cls is nn.Sequential:
        return Effect(*map(any, zip(_NONE, *(module_effect(child) for child in module), strict=True)))
    return _UNKNOWN


def _effect(block: nn.Module, node: fx.Node) -> Effect:
    if node.op in ("placeholder", "output"):
        return _NONE
    if node.op == "call_module":
        return module_effect(block.get_submodule(node.target))
    name = called(node)
    if name in ("dropout", "dropout2d"):
        return _UNKNOWN
    if name == "relu" and node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False):
        return _WRITES
    return _EFFECTS.get(name, _UNKNOWN)


class Order:
    """The effects of one graph's nodes, and who may share memory with whom."""

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self.block, self.nodes = block, list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.named = {node.name: node for node in self.nodes}
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
        found = {n: self.block.get_submodule(n.target) for n in self.nodes if n.op == "call_module"}
        modules = [found[node] for node in inside if node in found]
        own = [id(m) for m in modules if any(True for _ in itertools.chain(m.parameters(), m.buffers()))]
        if len(set(own)) < len(own):
            return "a convolution or batch norm is called twice"
        for node, module in found.items():
            if node not in inside and any(id(inner) in own for inner in module.modules()):
                return f"a convolution or batch norm is called by {node.name} as well"
        return ""
