"""Recognise a block that is convolutions, batch norms, ReLUs and additions and nothing else: one program for all of it.

Where a norm stands before its convolution, chains (:mod:`.program`) reach only the middle of a block; a program takes
the norm in front, the addition behind and values with several readers as well. Nothing in it runs before or after where
stock runs it but what cannot tell the difference: running statistics move at the end, drop path draws at the start.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..blocks import norms
from ..blocks.program_site import Shape
from ..blocks.site import why_not_conv
from ..plan.lower import obstacle
from ..steps.program import Addition, Convolution, Node, Normalisation, Program
from ..steps.spec import Conv, Norm
from .program import is_drop_path

_ADDS = {operator.add: False, operator.iadd: True, torch.add: False, "add": False, "add_": True}  # in place or not
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


class _Reader:
    """The nodes of a graph as those of a program."""

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self.block, self.graph = block, graph
        self.nodes: list[Node] = []
        self.names: list[str] = []
        self.values: dict[fx.Node, int] = {}
        self.dropped: set[fx.Node] = set()
        self.bypassed: set[str] = set()
        self.drop_path: str | None = None

    def read(self) -> str:
        """Why the graph is no program; empty if it is."""
        for node in self.graph.nodes:
            reason = self._node(node)
            if reason:
                return reason
        used = [name for name in self.names if name]
        if len(set(used)) < len(used):
            return "a module that is called twice"
        return obstacle(Program(tuple(self.nodes)))

    def _node(self, node: fx.Node) -> str:
        adds = node.op in ("call_function", "call_method") and node.target in _ADDS
        if not adds and not self.dropped.isdisjoint(node.all_input_nodes) and not self._is_identity(node):
            return "a drop path that no addition follows"
        if node.op == "placeholder":
            self.values[node] = 0
            return ""
        if node.op == "output":
            result = node.args[0]
            is_last = isinstance(result, fx.Node) and self.values.get(result) == len(self.nodes)
            return "" if is_last else "a result that is not its last value"
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            return self._module(node, self.block.get_submodule(node.target))
        if adds:
            return self._addition(node)
        if node.target in _RELUS:
            return self._relu(node)
        return f"{getattr(node.target, '__name__', node.target)} in its forward"

    def _is_identity(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self.block.get_submodule(node.target)) is nn.Identity

    def _make(self, node: fx.Node, made: Node, name: str = "") -> str:
        self.nodes.append(made)
        self.names.append(name)
        self.values[node] = len(self.nodes)
        return ""

    def _module(self, node: fx.Node, module: nn.Module) -> str:
        before = node.args[0]
        if isinstance(module, nn.Conv2d):
            return why_not_conv(module) or self._make(node, Convolution(self.values[before], Conv()), node.target)
        if not norms.why_not(module):
            return self._norm(node, module)
        if type(module) is nn.ReLU:
            return self._relu(node) or self._bypass(node)
        if type(module) is nn.Identity:
            self.values[node] = self.values[before]
            if before in self.dropped:
                self.dropped.add(node)
            return self._bypass(node)
        if is_drop_path(module) and self.drop_path is None:
            if not self._is_sole(before):
                return "a drop path beside another reader"
            self.values[node], self.drop_path = self.values[before], node.target
            self.dropped.add(node)
            return self._bypass(node)
        return f"a module of class {type(module).__name__}"

    def _is_sole(self, node: fx.Node) -> bool:
        """Whether a value, under all of its names, has one reader."""
        return all(len(name.users) == 1 for name, value in self.values.items() if value == self.values[node])

    def _bypass(self, node: fx.Node) -> str:
        self.bypassed.add(node.target)
        return ""

    def _norm(self, node: fx.Node, module: nn.Module) -> str:
        act = norms.activation_of(module)
        if act is not None and type(act) not in (nn.ReLU, nn.Identity):
            return f"a norm with an activation of class {type(act).__name__}"
        if act is not None:
            self.bypassed |= {f"{node.target}.{name}" for name, _ in module.named_children()}
        source = self.values[node.args[0]]
        return self._make(node, Normalisation(source, Norm(), type(act) is nn.ReLU), node.target)

    def _relu(self, node: fx.Node) -> str:
        """A ReLU belongs to the norm or the addition before it, which nobody else may read; it may work in place."""
        before = node.args[0]
        made = self.nodes[self.values[before] - 1] if self.values[before] else None
        if isinstance(made, Convolution | None) or made.relu or not self._is_sole(before) or before in self.dropped:
            return "a ReLU of something but a batch norm or an addition"
        self.nodes[self.values[before] - 1] = dataclasses.replace(made, relu=True)
        self.values[node] = self.values[before]
        return ""

    def _addition(self, node: fx.Node) -> str:
        if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
            return "an addition of something but two values"
        first, second = node.args
        if not self._is_branch(first) or second in self.dropped:
            first, second = second, first
        if not self._is_branch(first) or second in self.dropped:
            return "an addition to something that is neither a convolution nor a batch norm, or is read elsewhere too"
        if _ADDS[node.target] and first is not node.args[0]:
            return "an addition in place to what others may read"
        sampled, other_first = first in self.dropped, first is not node.args[0]
        addition = Addition(self.values[first], self.values[second], False, sampled, other_first)
        return self._make(node, addition)

    def _is_branch(self, node: fx.Node) -> bool:
        made = self.nodes[self.values[node] - 1] if self.values[node] else None
        if made is None or not self._is_sole(node):
            return False
        return isinstance(made, Convolution) or (isinstance(made, Normalisation) and not made.relu)


def recognise(block: nn.Module, graph: fx.Graph) -> Shape | None:
    """The whole of a traced block as a program's shape; None where it is none."""
    reader = _Reader(block, graph)
    if reader.read():
        return None
    kinds = tuple((name, type(block.get_submodule(name)).__name__) for name in sorted(reader.bypassed))
    return Shape(tuple(reader.nodes), tuple(reader.names), kinds, reader.drop_path)
