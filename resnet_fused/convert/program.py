"""Turn a traced block into a form: the programs that it is made of, with whatever lies between them left stock.

A block that is convolutions, batch norms, ReLUs and additions and nothing else is one program. Nothing in it runs
before or after where stock runs it but what cannot tell the difference: running statistics move at the end, drop path
draws at the start.

Where something else is in it, programs are found greedily, from the front: a convolution whose only reader is a batch
norm starts one; ReLU and the next such pair extend it; an addition and the ReLU behind it, or a max pool, close it.
Squeeze-excite, anti-aliasing, drop block or an unknown activation end a program early and stay stock calls, so that a
block is fused around them. A program that may not run where its last node stands (:mod:`.order`) is made shorter, or
not at all.
"""

from __future__ import annotations

import dataclasses

from torch import fx, nn

from ..blocks import norms
from ..blocks.layers import why_not_conv
from ..blocks.shape import Shape
from .instructions import Form, ShapeCall, StockCall, plain
from .nodes import Nodes, shape_of
from .order import Order, module_effect
from .shares import unpaired

_Pair = tuple[fx.Node, fx.Node]  # a convolution and its batch norm


@dataclasses.dataclass
class _Region:
    """Nodes that are to be one program."""

    source: fx.Node  # what it reads first
    end: fx.Node
    inside: list[fx.Node]
    residual: fx.Node | None = None
    draws: bool = False


class _Builder:
    """State of the greedy pass over one graph."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes, self.graph = nodes, nodes.graph
        self.taken: dict[fx.Node, ShapeCall | None] = {}  # nodes inside programs; the call is at the last node
        self.reasons: list[str] = []
        self.order = Order(nodes.block, nodes.graph)
        self.between: dict[str, None] = {}  # names of modules that stand inside a program and are none of its own

    def pair(self, conv_node: fx.Node | None) -> _Pair | None:
        """The convolution and its batch norm, if `conv_node` is a fusible convolution read by one alone."""
        conv = self.nodes.module(conv_node)
        if not isinstance(conv, nn.Conv2d) or conv_node in self.taken:
            return None
        norm_node = self.nodes.only_reader(conv_node)
        norm = self.nodes.module(norm_node)
        if norm is None or norm_node in self.taken or not norms.is_norm(norm):
            return None
        reason = why_not_conv(conv) or norms.why_not(norm)
        if reason:
            self.reasons.append(reason)
            return None
        return conv_node, norm_node

    def grow(self, first: _Pair) -> None:
        """Take the longest program from `first`, with what closes it where that may be."""
        source, inside, pending, following = first[0].args[0], [], [], first
        region = clamped = None  # the nodes up to here that could be a program, and whether they end in a ReLU
        while following is not None:
            clamps, passed = self.nodes.clamps(following[1]), []
            if clamps is None:  # the pair stays stock
                self.reasons.append("a batch norm with an activation of its own that is no ReLU")
                break
            inside, end, clamped = [*inside, *pending, *following], following[1], True
            reader = self.nodes.skip_identities(end, passed)
            if not clamps and self.nodes.is_relu(reader):
                inside, end = [*inside, *passed, reader], reader
            elif not clamps:
                clamped = False
            region, pending = _Region(source, end, inside), []
            following = self.pair(self.nodes.skip_identities(end, pending)) if clamped else None
        if region is not None:
            closed = self._pool(region) if clamped else self._join(region)
            self._take(closed) or self._take(region)

    def _take(self, region: _Region | None) -> bool:
        """Mark the nodes of a program, and note the modules that must stay what they are; whether it is one."""
        if region is None:
            return False
        reason = self.order.obstacle(region.inside, region.source, region.draws)
        inputs = (region.source,) if region.residual in (None, region.source) else (region.source, region.residual)
        inside = sorted(region.inside, key=self.order.place.get)
        shape = reason or shape_of(self.nodes, inside, inputs)
        if isinstance(shape, str):
            self.reasons.append(shape)
            return False
        self.between |= dict.fromkeys(n.target for n in self.order.between(inside) if n.op == "call_module")
        self.taken.update(dict.fromkeys(inside))
        self.taken[region.end] = ShapeCall(shape, tuple(node.name for node in inputs), region.end.name)
        return True

    def _pool(self, region: _Region) -> _Region | None:
        """Extend a program that ends in a ReLU over a max pool."""
        pool = self.nodes.only_reader(region.end)
        if type(self.nodes.module(pool)) is not nn.MaxPool2d:
            return None
        return _Region(region.source, pool, [*region.inside, pool])

    def _join(self, region: _Region) -> _Region | None:
        """Extend a program that ends in a batch norm over drop path, addition and ReLU, as far as they are there."""
        passed: list[fx.Node] = []
        node = self.nodes.skip_identities(region.end, passed)
        draws = self.nodes.is_drop_path(node)
        if draws:
            passed.append(node)
            node = self.nodes.skip_identities(node, passed)
        if self.nodes.adds(node) is None or node in self.taken or len(node.args) != 2:
            return None
        branch = passed[-1] if passed else region.end
        residual = node.args[1] if node.args[0] is branch else node.args[0]
        if (
            not isinstance(residual, fx.Node)
            or residual is branch
            or (self.nodes.adds(node) and residual is node.args[0])
        ):
            return None
        end, inside = node, [*region.inside, *passed, node]
        reader = self.nodes.only_reader(node)
        if self.nodes.is_relu(reader):
            end, inside = reader, [*inside, reader]
        shortcut = self._projection(residual, region.source)
        return _Region(region.source, end, inside + shortcut, None if shortcut else residual, draws)

    def _projection(self, residual: fx.Node, source: fx.Node) -> list[fx.Node]:
        """The convolution and norm that make `residual` from the program's input, if that is what it is."""
        passed: list[fx.Node] = []
        node = residual
        while type(self.nodes.module(node)) is nn.Identity and len(node.users) == 1:
            passed.append(node)
            node = node.args[0]
        if self.nodes.module(node) is None or len(node.users) != 1 or not isinstance(node.args[0], fx.Node):
            return []
        pair = self.pair(node.args[0])
        if pair is None or pair[1] is not node or pair[0].args[0] is not source or self.nodes.clamps(node) is not False:
            return []
        return [*passed, *pair]

    def main_first(self) -> list[fx.Node]:
        """Convolutions, those followed by a ReLU first: the main branch finds its projection, not the reverse."""
        convs = [node for node in self.graph.nodes if isinstance(self.nodes.module(node), nn.Conv2d)]

        def leads_to_relu(node: fx.Node) -> bool:
            norm = self.nodes.only_reader(node)
            return norm is not None and self.nodes.is_relu(self.nodes.skip_identities(norm, []))

        return sorted(convs, key=lambda node: not leads_to_relu(node))


def build(block: nn.Module, graph: fx.Graph) -> tuple[Form | None, list[str]]:
    """The form of a traced block, None where nothing is fusible, and reasons why something that looked so is not."""
    nodes = Nodes(block, graph)
    whole = _whole(nodes)
    if whole is not None:
        return whole, []
    builder = _Builder(nodes)
    for node in builder.main_first():
        pair = None if node in builder.taken else builder.pair(node)
        if pair is not None:
            builder.grow(pair)
    parts = _form(nodes, _schedule(graph, builder.taken), builder.between)
    if parts.shapes:
        return parts, builder.reasons
    return None, builder.reasons or [unpaired(block, parts) or "no convolution followed by batch norm"]


def _whole(nodes: Nodes) -> Form | None:
    """All of a block as one program; None where it is none."""
    *inside, output = nodes.graph.nodes
    source = next(node for node in inside if node.op == "placeholder")
    inside.remove(source)
    result = output.args[0]
    shape = shape_of(nodes, inside, (source,)) if inside and result is inside[-1] else ""
    if not isinstance(shape, Shape):
        return None
    return _form(nodes, [ShapeCall(shape, (source.name,), result.name)], {})


def _form(nodes: Nodes, calls: list[ShapeCall | StockCall], between: dict[str, None]) -> Form:
    """The form of these calls, with all that must stay what it is for it."""
    block, graph = nodes.block, nodes.graph
    source = next(node.name for node in graph.nodes if node.op == "placeholder")
    result = next(node.args[0] for node in graph.nodes if node.op == "output")
    targets = {node.target for node in graph.nodes if node.op == "call_module"}
    holders = sorted({target.rpartition(".")[0] for target in targets} - {""})
    taken = {name for call in calls if isinstance(call, ShapeCall) for name in call.shape.modules}
    stood_between = [
        (name, kind, module_effect(block.get_submodule(name))) for name, kind in nodes.kinds(set(between) - taken)
    ]
    return Form(
        tuple(calls),
        source,
        plain(result),
        tuple((name, len(block.get_submodule(name))) for name in holders),
        tuple(stood_between),
        tuple(sorted(taken | targets)),
    )


def _schedule(graph: fx.Graph, taken: dict[fx.Node, ShapeCall | None]) -> list[ShapeCall | StockCall]:
    """Instructions in graph order; a program runs where its last node was, after everything it reads."""
    calls: list[ShapeCall | StockCall] = []
    for node in graph.nodes:
        if node in taken:
            calls += [] if taken[node] is None else [taken[node]]
        elif node.op in ("call_module", "call_function", "call_method"):
            kwargs = tuple(plain(node.kwargs).items())
            calls.append(StockCall(node.op, node.target, plain(node.args), kwargs, node.name))
    return calls
