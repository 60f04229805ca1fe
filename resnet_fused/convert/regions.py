"""Turn a traced block into a form: the programs that it is made of, with whatever lies between them left stock.

A block that is convolutions, batch norms, ReLUs and additions and nothing else is one program. Nothing in it runs
before or after where stock runs it but what cannot tell the difference: running statistics move at the end, drop path
draws at the start.

Where something else is in it, programs are found greedily: each begins with a convolution and goes on along the only
reader of every value, with the shortcut of an addition, for as long as that is a program and may run where its last
node stands (:mod:`.order`). Anti-aliasing, drop block or an unknown activation end a program early and stay stock
calls, so that a block is fused around them. Squeeze-excite and its kin (:mod:`.gates`) are split: the product with the
sum and ReLU behind it is one pass, what makes the factor stays stock calls.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from ..blocks import norms
from ..blocks.shape import Shape
from . import gates
from .instructions import Form, GateCall, GatedSum, ShapeCall, StockCall, plain
from .nodes import Nodes, NoProgram, Reader
from .opened import read
from .order import Order, module_effect
from .trace import Untraceable

_Nodes = tuple[fx.Node, ...]


class _Builder:
    """State of the greedy pass over one graph."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes, self.graph = nodes, nodes.graph
        #: Nodes inside programs and gates; the call is at the last node.
        self.taken: dict[fx.Node, ShapeCall | GateCall | GatedSum | None] = {}
        self.ended: dict[fx.Node, str] = {}  # nodes that a program could have gone on over, and why it did not
        self.refused: list[str] = []  # modules that stand where a gate would, and why they are none
        self.order = Order(nodes.block, nodes.graph)
        self.between: dict[str, None] = {}  # names of modules that stand inside a program and are none of its own

    def grow(self, first: fx.Node) -> None:
        """Take the longest program that begins with `first`."""
        inputs, inside, node = (first.args[0],), (), first
        shape, taken = None, ()
        while node is not None and node not in self.taken:
            for shortcut, outside in self._summands(node, inside, inputs[0]):
                region = sorted((*inside, *shortcut, node), key=self.order.place.get)
                found = self._shape(region, (*inputs, *outside))
                if found is not None:
                    break
            else:
                break
            inside, inputs = region, (*inputs, *outside)
            if isinstance(found, Shape):
                shape, taken, source = found, inside, inputs
            node = self.nodes.only_reader(node)
        if shape is not None:
            self._note_between(taken)
            self._take(taken, shape, source)
        elif not any(isinstance(self.nodes.module(node), nn.Conv2d) for node in inside):
            self.ended = {node: reason for node, reason in self.ended.items() if node not in inside}

    def take_whole(self) -> bool:
        """Take all of the block as one program; whether it is one."""
        source, *inside, output = self.graph.nodes
        if not inside or output.args[0] is not inside[-1]:
            return False
        try:
            shape = Reader(self.nodes, inside, (source,)).shape()
        except NoProgram:
            return False
        if isinstance(shape, Shape):
            self._take(inside, shape, (source,))
        return isinstance(shape, Shape)

    def _take(self, region: list[fx.Node], shape: Shape, inputs: _Nodes) -> None:
        names = tuple(value.name for value in inputs)
        self.taken |= {**dict.fromkeys(region), region[-1]: ShapeCall(shape, names, region[-1].name)}

    def take_gates(self) -> None:
        """Take modules that gate what a norm made, with the sum and ReLU behind, before a shortcut's program does."""
        for node in self.graph.nodes:
            module, y = self.nodes.module(node), node.args[0] if node.args else None
            before = self.nodes.module(y)
            if module is None or before is None or norms.why_not(before) or len(y.users) > 1 or norms.is_norm(module):
                continue
            if type(module).__module__.startswith("torch.nn."):
                continue
            call = self._sum_behind(node)
            try:
                self.taken[node] = gates.read(module, node, call is not None)
            except Untraceable as error:
                self.refused += [] if call is None else [f"{node.target} is called: {error}"]
                continue
            if call is not None:
                inside = [self.order.named[stock.output] for stock in call.stock]
                self._note_between(inside)
                self.taken |= {**dict.fromkeys(inside), inside[-1]: call}

    def _note_between(self, inside: list[fx.Node]) -> None:
        self.between |= dict.fromkeys(n.target for n in self.order.between(inside) if n.op == "call_module")

    def _sum_behind(self, gated: fx.Node) -> GatedSum | None:
        """The sum that alone reads the node of a gate, with the ReLU behind it."""
        add, drop = self.nodes.only_reader(gated), None
        if self.nodes.is_drop_path(add):
            drop, add = add, self.nodes.only_reader(add)
        inplace = None if add in self.taken else self.nodes.adds(add)
        if inplace is None or len(add.args) != 2 or add.kwargs or not all(isinstance(a, fx.Node) for a in add.args):
            return None
        branch = gated if drop is None else drop
        other_first = add.args[1] is branch
        other, relu = add.args[0 if other_first else 1], self.nodes.only_reader(add)
        relu = relu if self.nodes.is_relu(relu) else None
        inside = [node for node in (drop, add, relu) if node is not None]
        if other is branch or (inplace and other_first) or self.order.obstacle(inside, other, drop is not None):
            return None
        stock, names = tuple(map(_stock_call, inside)), (gated.name, other.name)
        return GatedSum(stock, names, other_first, relu is not None, drop.target if drop else "", inside[-1].name)

    def _shape(self, region: list[fx.Node], inputs: _Nodes) -> Shape | str | None:
        """The program of a region; why it must go on to be one that may run where its end stands; None: it cannot."""
        end, draws = region[-1], any(map(self.nodes.is_drop_path, region))
        try:
            found = Reader(self.nodes, region, inputs).shape()
            if isinstance(found, str) and self.nodes.adds(end) is not None:
                raise NoProgram(found)
        except NoProgram as error:
            self.ended[end] = str(error)
            return None
        reason = found if isinstance(found, str) else self.order.obstacle(region, inputs[0], draws)
        if reason and not isinstance(self.nodes.module(end), nn.Conv2d):
            self.ended[end] = reason
        return reason or found

    def _summands(self, node: fx.Node, inside: _Nodes, source: fx.Node) -> Iterator[tuple[_Nodes, _Nodes]]:
        """Ways to have what `node` reads beside `inside`: nodes that make it from `source`, and values from outside."""
        others = tuple(read for read in node.all_input_nodes if read not in inside and read is not source)
        if self.nodes.adds(node) is not None and len(others) == 1:
            made, value = (), others[0]
            while self.nodes.module(value) is not None and len(value.users) == 1 and value not in self.taken:
                made, value = (value, *made), value.args[0]
            if value is source:
                yield made, ()
            yield (), others
        else:
            yield (), ()

    def form(self) -> Form:
        """The form of what was taken, with all that must stay what it is for it."""
        block, graph, calls = self.nodes.block, self.graph, self._calls()
        source = next(node.name for node in graph.nodes if node.op == "placeholder")
        result = next(node.args[0] for node in graph.nodes if node.op == "output")
        targets = {node.target for node in graph.nodes if node.op == "call_module"}
        empty = {n.target for n in graph.nodes if type(m := self.nodes.module(n)) is nn.Sequential and not len(m)}
        holders = sorted(set(empty).union(*map(_holders, targets)))
        opened = [name for name in holders if type(block.get_submodule(name)) is not nn.Sequential]
        taken = {name for call in calls if isinstance(call, ShapeCall) for name in call.shape.modules}
        between = self.nodes.kinds(set(self.between) - taken)
        return Form(
            tuple(calls),
            source,
            plain(result),
            tuple((name, len(block.get_submodule(name))) for name in holders if name not in opened),
            tuple((name, kind, module_effect(block.get_submodule(name))) for name, kind in between),
            tuple(sorted(taken | targets)),
            tuple(read(name, block.get_submodule(name)) for name in opened),
            tuple(sorted(set(self.nodes.quiet.values()))),
        )

    def _calls(self) -> list[ShapeCall | StockCall | GateCall | GatedSum]:
        """Instructions in graph order; a program runs where its last node was, after everything it reads."""
        calls = []
        for node in self.graph.nodes:
            if node in self.taken:
                calls += [] if self.taken[node] is None else [self.taken[node]]
            elif node.op in ("call_module", "call_function", "call_method"):
                calls.append(_stock_call(node))
        return calls

    def reasons(self) -> list[str]:
        """Why convolutions, norms and additions are in no program, as far as there are reasons."""

        def counts(node: fx.Node) -> bool:
            module = self.nodes.module(node)
            kept = isinstance(module, nn.Conv2d) or self.nodes.adds(node) is not None
            return node not in self.taken and (kept or (module is not None and norms.is_norm(module)))

        return [reason for node, reason in self.ended.items() if counts(node)] + self.refused

    def unpaired(self) -> list[str]:
        """The convolutions and batch norms that stay stock for want of each other."""
        stock = {node: self.nodes.module(node) for node in self.graph.nodes if node not in self.taken}
        batch_norms = [node for node, module in stock.items() if module is not None and not norms.why_not(module)]
        convs = [node for node, module in stock.items() if isinstance(module, nn.Conv2d)]
        before = [norm.args[0] for norm in batch_norms]
        lone_convs = [conv.target for conv in convs if conv not in before]
        lone_norms = [norm.target for norm in batch_norms if norm.args[0] not in convs]
        texts = [f"no batch norm right behind {_listed(lone_convs)}"] if lone_convs else []
        texts += [f"no convolution right before {_listed(lone_norms)}"] if lone_norms else []
        return [", ".join(texts)] if texts else []

    def norms_first(self) -> list[fx.Node]:
        """Norms behind no convolution, with which a program can begin."""

        def begins(node: fx.Node) -> bool:
            module = self.nodes.module(node)
            if module is None or norms.why_not(module):
                return False
            return not isinstance(self.nodes.module(node.args[0]), nn.Conv2d)

        return [node for node in self.graph.nodes if begins(node)]

    def main_first(self) -> list[fx.Node]:
        """Convolutions, first those with an activation: the main branch finds its projection, not the reverse."""
        convs = [node for node in self.graph.nodes if isinstance(self.nodes.module(node), nn.Conv2d)]

        def leads_on(node: fx.Node) -> bool:
            norm = self.nodes.only_reader(node)
            behind = None if norm is None else self.nodes.reader_behind(norm)
            return self.nodes.is_relu(behind) or self.nodes.act(behind) is not None

        return sorted(convs, key=lambda node: not leads_on(node))


def _stock_call(node: fx.Node) -> StockCall:
    return StockCall(node.op, node.target, plain(node.args), tuple(plain(node.kwargs).items()), node.name)


def _holders(target: str) -> set[str]:
    """The names of what holds the module of that name within a block."""
    atoms = target.split(".")
    return {".".join(atoms[:i]) for i in range(1, len(atoms))}


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def build(block: nn.Module, graph: fx.Graph, quiet: bool = False) -> tuple[Form | None, list[str]]:
    """The form of a traced block, None where nothing is fusible, and reasons why something that looked so is not.

    `quiet`: while its dropouts do nothing.
    """
    builder = _Builder(Nodes(block, graph, quiet))
    if not builder.take_whole():
        builder.take_gates()
        for node in (*builder.norms_first(), *builder.main_first()):
            builder.grow(node)
    form, reasons = builder.form(), builder.reasons()
    if form.shapes:
        return form, reasons + builder.unpaired()
    return None, reasons or builder.unpaired() or ["no convolution followed by batch norm"]
