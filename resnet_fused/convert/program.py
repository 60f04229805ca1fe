"""Turn a traced block into a program: fused chains, with whatever lies between them left stock.

Greedy, from the front: a convolution whose only reader is a batch norm starts a chain; ReLU and the next such pair
extend it; an addition and the ReLU behind it close it. Squeeze-excite, anti-aliasing, drop block or an unknown
activation end a chain early and stay stock calls, so that a block is fused around them. A chain that may not run where
its last node stands (:mod:`.order`) is made shorter, or not at all.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..blocks import norms
from ..blocks.site import why_not_conv
from .instructions import ChainCall, Program, StockCall, plain
from .order import Order, module_effect

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, "add_"}
_RELU_FUNCTIONS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}


class _Builder:
    """State of the greedy pass over one graph."""

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self.block, self.graph = block, graph
        self.taken: dict[fx.Node, ChainCall | None] = {}  # nodes inside chains; the call is at the chain's last node
        self.reasons: list[str] = []
        self.order = Order(block, graph)
        self.between: dict[str, None] = {}  # names of modules that stand inside a chain and are none of its own

    def module(self, node: fx.Node | None) -> nn.Module | None:
        if node is None or node.op != "call_module" or node.kwargs or len(node.args) != 1:
            return None
        return self.block.get_submodule(node.target)

    @staticmethod
    def only_reader(node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def is_relu(self, node: fx.Node | None) -> bool:
        if node is None:
            return False
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU
        return node.target in _RELU_FUNCTIONS and node.op in ("call_function", "call_method")

    def is_identity(self, node: fx.Node | None) -> bool:
        return node is not None and isinstance(self.module(node), nn.Identity)

    def skip_identities(self, node: fx.Node, passed: list[fx.Node]) -> fx.Node | None:
        """The only reader of `node`, looking through Identity modules, which are noted in `passed`."""
        reader = self.only_reader(node)
        while self.is_identity(reader):
            passed.append(reader)
            reader = self.only_reader(reader)
        return reader

    def pair(self, conv_node: fx.Node | None) -> tuple[fx.Node, fx.Node] | None:
        """The convolution and its batch norm, if `conv_node` is a fusible convolution read by one alone."""
        conv = self.module(conv_node)
        if conv is None or conv_node in self.taken or not isinstance(conv, nn.Conv2d):
            return None
        norm_node = self.only_reader(conv_node)
        norm = self.module(norm_node)
        if norm is None or norm_node in self.taken:
            return None
        reason = why_not_conv(conv) or norms.why_not(norm)
        if reason:
            self.reasons.append(reason)
            return None
        return conv_node, norm_node

    def norm_activation(self, norm_node: fx.Node) -> bool | None:
        """Of a combined norm: True if it clamps, False if it does nothing, None if it is something else."""
        act = norms.activation_of(self.module(norm_node))
        if act is None or isinstance(act, nn.Identity):
            return False
        return True if type(act) is nn.ReLU else None

    def grow(self, first: tuple[fx.Node, fx.Node]) -> ChainCall | None:
        """The longest chain from `first`; marks its nodes as taken."""
        pairs, bypassed, end, relu = [first], [], first[1], False
        while True:
            combined = self.norm_activation(pairs[-1][1])
            if combined is None:
                pairs.pop()  # its own activation cannot be fused; the pair stays stock
                if not pairs:
                    return None
                end, relu = self._behind(pairs, bypassed)
                break
            passed: list[fx.Node] = []
            reader = self.skip_identities(pairs[-1][1], passed)
            if combined:
                end, relu = pairs[-1][1], True
            elif self.is_relu(reader):
                end, relu = reader, True
                bypassed += [*passed, reader]
            else:
                relu = False
                break
            ahead: list[fx.Node] = []
            following = self.pair(self.skip_identities(end, ahead))
            if following is None:
                break
            bypassed += ahead
            pairs.append(following)
            end = following[1]
        return self._close(pairs, bypassed, end, relu)

    def _behind(self, pairs, bypassed) -> tuple[fx.Node, bool]:
        """Where the chain ends once its last pair was given back: at the ReLU before it."""
        end = pairs[-1][1]
        reader = self.skip_identities(end, [])
        return (reader, True) if self.is_relu(reader) else (end, True)

    def _close(self, pairs, bypassed, end, relu) -> ChainCall | None:
        """The chain of `pairs`, with what closes it where that may be; None where even the pairs may not be moved."""
        bare = ChainCall(
            steps=tuple((conv.target, norm.target) for conv, norm in pairs),
            input=pairs[0][0].args[0].name,
            output=end.name,
            relu=relu,
        )
        own = [node for pair in pairs for node in pair] + bypassed
        candidates = [(bare, end, [])]
        if not relu:
            candidates.insert(0, self._join(bare, pairs, end))
        elif type(self.module(self.only_reader(end))) is nn.MaxPool2d:
            pool = self.only_reader(end)
            candidates.insert(0, (dataclasses.replace(bare, pool=pool.target), pool, [pool]))
        for call, last, more in candidates:
            reason = self.order.obstacle(own + more, pairs[0][0].args[0], call.drop_path is not None)
            if not reason:
                return self._take(call, last, own + more)
            self.reasons.append(reason)
        return None

    def _take(self, call: ChainCall, end: fx.Node, inside: list[fx.Node]) -> ChainCall:
        """Mark the nodes of a chain, and note the modules that must stay what they are."""
        modules = {node.target for node in inside if node.op == "call_module"}
        paired = {name for step in (*call.steps, call.shortcut or ()) for name in step}
        modules = modules - paired - {call.pool}
        for norm in (step[1] for step in (*call.steps, *((call.shortcut,) if call.shortcut else ()))):
            if norms.activation_of(self.block.get_submodule(norm)) is not None:
                modules |= {f"{norm}.{name}" for name, _ in self.block.get_submodule(norm).named_children()}
        call = dataclasses.replace(call, output=end.name, bypassed=self.kinds(modules))
        self.between |= dict.fromkeys(n.target for n in self.order.between(inside) if n.op == "call_module")
        self.taken.update(dict.fromkeys(inside))
        self.taken[end] = call
        return call

    def kinds(self, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """Modules by name, with the names of their classes."""
        return tuple((name, type(self.block.get_submodule(name)).__name__) for name in sorted(names))

    def _join(self, call: ChainCall, pairs, norm_node) -> tuple[ChainCall, fx.Node, list[fx.Node]]:
        """Extend a chain that ends in a batch norm over drop path, addition and ReLU, as far as they are there."""
        passed: list[fx.Node] = []
        node = self.skip_identities(norm_node, passed)
        drop_path = None
        if node is not None and is_drop_path(self.module(node)):
            drop_path = node.target
            passed.append(node)
            node = self.skip_identities(node, passed)
        adds = node is not None and node.op in ("call_function", "call_method") and node.target in _ADD
        if (
            not adds
            or node in self.taken
            or len(node.args) != 2
            or node.kwargs
            or not isinstance(node.args[1], fx.Node)
        ):
            return call, norm_node, []
        branch = passed[-1] if passed else norm_node
        residual = node.args[1] if node.args[0] is branch else node.args[0]
        if not isinstance(residual, fx.Node) or residual is branch:
            return call, norm_node, []
        inplace = node.target in _IN_PLACE
        if inplace and node.args[0] is not branch:
            return call, norm_node, []
        end, inside = node, [*passed, node]
        relu_node = self.only_reader(node)
        relu = self.is_relu(relu_node)
        if relu:
            end, inside = relu_node, [*inside, relu_node]
        shortcut, shortcut_nodes = self._projection(residual, pairs[0][0].args[0])
        call = dataclasses.replace(
            call,
            relu=relu,
            drop_path=drop_path,
            inplace_add=inplace,
            shortcut=shortcut,
            residual=None if shortcut else residual.name,
        )
        return call, end, inside + shortcut_nodes

    def _projection(self, residual: fx.Node, source: fx.Node) -> tuple[tuple[str, str] | None, list[fx.Node]]:
        """The convolution and norm that make `residual` from the chain's input, if that is what it is."""
        passed: list[fx.Node] = []
        node = residual
        while self.is_identity(node) and len(node.users) == 1:
            passed.append(node)
            node = node.args[0]
        if self.module(node) is None or len(node.users) != 1 or not isinstance(node.args[0], fx.Node):
            return None, []
        pair = self.pair(node.args[0])
        if pair is None or pair[1] is not node or pair[0].args[0] is not source or self.norm_activation(node):
            return None, []
        return (pair[0].target, pair[1].target), [*passed, *pair]


def is_drop_path(module: nn.Module | None) -> bool:
    """timm's DropPath, whose random call this package repeats."""
    return module is not None and (type(module).__module__, type(module).__name__) == ("timm.layers.drop", "DropPath")


def build(block: nn.Module, graph: fx.Graph) -> tuple[Program, list[str]]:
    """The program of a traced block, and reasons why pairs that looked fusible were not."""
    builder = _Builder(block, graph)
    for node in _main_first(graph, builder):
        if node not in builder.taken:
            pair = builder.pair(node)
            if pair is not None:
                builder.grow(pair)
    calls = _schedule(graph, builder.taken)
    source = next(node.name for node in graph.nodes if node.op == "placeholder")
    result = next(node.args[0] for node in graph.nodes if node.op == "output")
    targets = [node.target for node in graph.nodes if node.op == "call_module"]
    names = sorted({target.rpartition(".")[0] for target in targets} - {""})
    containers = tuple((name, len(block.get_submodule(name))) for name in names)
    taken = {name for call in builder.taken.values() if call for name in modules_of(call)}
    between = [
        (name, kind, module_effect(block.get_submodule(name)))
        for name, kind in builder.kinds(set(builder.between) - taken)
    ]
    modules = tuple(sorted(taken.union(targets)))
    parents = sorted({name.rpartition(".")[0] for name in modules} - {""})
    return Program(
        tuple(calls), source, plain(result), containers, tuple(between), modules, tuple(parents)
    ), builder.reasons


def modules_of(call: ChainCall) -> list[str]:
    """Names of all modules that a chain stands in for."""
    pairs = (*call.steps, *(() if call.shortcut is None else (call.shortcut,)))
    names = [name for pair in pairs for name in pair] + [name for name, _ in call.bypassed]
    return names if call.pool is None else [*names, call.pool]


def _main_first(graph: fx.Graph, builder: _Builder) -> list[fx.Node]:
    """Convolutions, those followed by a ReLU first: the main branch finds its projection, not the reverse."""
    convs = [node for node in graph.nodes if isinstance(builder.module(node), nn.Conv2d)]

    def leads_to_relu(node: fx.Node) -> bool:
        norm = builder.only_reader(node)
        return norm is not None and builder.is_relu(builder.skip_identities(norm, []))

    return sorted(convs, key=lambda node: not leads_to_relu(node))


def _schedule(graph: fx.Graph, taken: dict[fx.Node, ChainCall | None]) -> list[ChainCall | StockCall]:
    """Instructions in graph order; a chain runs where its last node was, after everything it reads."""

    calls: list[ChainCall | StockCall] = []
    for node in graph.nodes:
        if node in taken:
            if taken[node] is not None:
                calls.append(taken[node])
        elif node.op in ("call_module", "call_function", "call_method"):
            calls.append(
                StockCall(node.op, node.target, plain(node.args), tuple(plain(node.kwargs).items()), node.name)
            )
    return calls
