"""The nodes of a traced graph by what they are, and regions of them as the shapes of programs."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable

from torch import fx, nn

from ..blocks import drop_paths, norms
from ..blocks.layers import act_of, average_geometry, conv_geometry, kind_of, why_not_average, why_not_conv
from ..blocks.shape import Shape
from ..plan.lower import obstacle
from ..steps import Act, Average, Conv, Norm, Pool
from ..steps.program import Addition, Averaging, Convolution, Node, Normalisation, Pooling, Program, reading
from . import acts
from .dropouts import decided_by
from .outside import called

_ADDS = {"add": False, "iadd": True, "add_": True}  # in place or not


class Nodes:
    """What the nodes of one graph are; of None, nothing."""

    def __init__(self, block: nn.Module, graph: fx.Graph, quiet: bool = False) -> None:
        self.block, self.graph = block, graph
        #: Dropouts that do nothing, by the name of what decides that they do not.
        self.quiet: dict[fx.Node, str] = {}
        for node in graph.nodes if quiet else ():
            name = decided_by(node, self.module(node))
            self.quiet |= {} if name is None else {node: name}

    def module(self, node: fx.Node | None) -> nn.Module | None:
        """The module that a node calls with one value."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs or len(node.args) != 1:
            return None
        return self.block.get_submodule(node.target)

    @staticmethod
    def adds(node: fx.Node | None) -> bool | None:
        """Of an addition, whether it is in place; None of all else."""
        return None if node is None else _ADDS.get(called(node))

    def is_relu(self, node: fx.Node | None) -> bool:
        return type(self.module(node)) is nn.ReLU or (node is not None and called(node) in ("relu", "relu_"))

    def act(self, node: fx.Node | None) -> Act | None:
        """The activation other than ReLU that a node is."""
        module = self.module(node)
        return acts.read(node) if module is None else act_of(module)

    def is_drop_path(self, node: fx.Node | None) -> bool:
        """A drop path whose random call this package repeats."""
        return drop_paths.is_one(self.module(node))

    @staticmethod
    def only_reader(node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def reader_behind(self, node: fx.Node) -> fx.Node | None:
        """The only reader of `node`, behind Identity modules."""
        reader = self.only_reader(node)
        return self.reader_behind(reader) if self.is_identity(reader) else reader

    def is_identity(self, node: fx.Node | None) -> bool:
        """Whether a node passes its argument on: an Identity, an empty Sequential, a dropout that does nothing."""
        module = self.module(node)
        empty = type(module) is nn.Sequential and not len(module)
        return empty or type(module) is nn.Identity or node in self.quiet

    def kinds(self, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """Modules by name, with the names of their classes."""
        return tuple((name, type(self.block.get_submodule(name)).__name__) for name in sorted(names))

    def passed(self, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """Modules that a program passes over by name, with what each is."""
        return tuple((name, kind_of(self.block.get_submodule(name))) for name in sorted(names))


class NoProgram(Exception):
    """Why a node cannot be part of a program."""


def _average_of(node: fx.Node) -> Average:
    """The settings of a call of ``avg_pool2d``.

    Raises:
        NoProgram: they are not all constants, or odd.
    """
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    pool = types.SimpleNamespace(
        **{"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
        | given
    )
    parts = [part for value in given.values() for part in (value if isinstance(value, tuple) else (value,))]
    plain = all(isinstance(part, int | None) for part in parts) and set(given) <= set(names)
    average = average_geometry(pool) if plain and hasattr(pool, "kernel_size") else None
    if average is None:
        raise NoProgram("an average pool of odd numbers")
    return average


class Reader:
    """A region of a graph as a program of `inputs`.

    Raises:
        NoProgram: its nodes, in the graph's order, cannot be part of one.
    """

    def __init__(self, nodes: Nodes, region: Iterable[fx.Node], inputs: tuple[fx.Node, ...]) -> None:
        self.read, self.inputs = nodes, inputs
        self.made: dict[fx.Node, Node] = {}  # they read nodes of the graph until :meth:`_program` numbers these
        self.value = {node: node for node in inputs}  # which of `made` or `inputs` a node, perhaps a ReLU, passes on
        self.dropped: set[fx.Node] = set()
        self.bypassed: set[str] = set()
        self.inplace: set[bool] = set()
        self.drop_path = ""
        for self.end in region:
            self._take(self.end)

    def shape(self) -> Shape | str:
        """The program that ends in the last node; or why there is none, although with others behind it may be one."""
        called = [node.target for node in self.made if node.op == "call_module"]
        if len(set(called)) < len(called):
            return "a module that is called twice"
        if len(self.inplace) > 1:
            return "an addition in place beside one that is not"
        if self.end in self.dropped:
            return "a drop path that no addition follows"
        if not any(isinstance(made, Convolution) for made in self.made.values()):
            return "no convolution"
        program, names = self._program(self.value[self.end])
        if len(names) < len(self.made) or not all(map(program.readers, range(program.inputs))):
            return "a value that nobody reads"
        kinds, inplace = self.read.passed(self.bypassed), True in self.inplace
        return obstacle(program) or Shape(program, names, kinds, self.drop_path, inplace)

    def _program(self, end: fx.Node) -> tuple[Program, tuple[str, ...]]:
        """What makes the value `end`, each node behind what it reads, first the branch of an addition; and their names.

        So a residual program has them.
        """
        numbers = {node: value for value, node in enumerate(self.inputs)}
        nodes: list[Node] = []
        names: list[str] = []

        def number(node: fx.Node) -> int:
            if node not in numbers:
                made = self.made[node]
                nodes.append(reading(made, [*map(number, made.reads)]))
                names.append(node.target if node.op == "call_module" else "")
                numbers[node] = len(numbers)
            return numbers[node]

        number(end)
        return Program(tuple(nodes), len(self.inputs)), tuple(names)

    def _take(self, node: fx.Node) -> None:
        inplace, module = self.read.adds(node), self.read.module(node)
        identity = self.read.is_identity(node)
        if inplace is None and not identity and not self.dropped.isdisjoint(node.all_input_nodes):
            raise NoProgram("a drop path that no addition follows")
        if inplace is not None:
            self._addition(node, inplace)
        elif self.read.is_relu(node):
            self._relu(node)
        elif self.read.act(node) is not None:
            self._activation(node, self.read.act(node))
        elif called(node) == "avg_pool2d":
            self._average(node, _average_of(node))
        elif module is None and not identity:
            raise NoProgram(f"{getattr(node.target, '__name__', node.target)} in its forward")
        elif node.args[0] not in self.value:
            raise NoProgram(f"an input of {node.name} that is no value of its own")
        elif identity:
            self._pass(node)
            self.dropped |= {node} if node.args[0] in self.dropped else set()
        elif isinstance(module, nn.Conv2d):
            if reason := why_not_conv(module):
                raise NoProgram(reason)
            self._make(node, Convolution(self.value[node.args[0]], Conv()))
        elif type(module) is nn.MaxPool2d:
            self._make(node, Pooling(self.value[node.args[0]], Pool()))
        elif type(module) is nn.AvgPool2d:
            if reason := why_not_average(module):
                raise NoProgram(reason)
            self._average(node, average_geometry(module))
        elif self.read.is_drop_path(node):
            self._drop(node)
        else:
            self._norm(node, module)

    def _average(self, node: fx.Node, average: Average) -> None:
        """An average pool. Behind a convolution it is to be taken before that, which must be the same."""
        source = node.args[0] if node.args else None
        if source not in self.value:
            raise NoProgram(f"an input of {node.name} that is no value of its own")
        padded = average.padding != (0, 0) or average.divisor_override is not None
        if isinstance(self._made(source), Convolution):
            conv = self.read.module(self.value[source])
            geometry = conv_geometry(conv)
            if not geometry.is_pointwise(conv.weight) or geometry.stride != (1, 1) or padded or average.ceil_mode:
                raise NoProgram("an average pool of a convolution that it does not commute with")
        if isinstance(self._made(source), Normalisation) and padded:
            raise NoProgram("an average pool with padding, or a divisor of its own, of a batch norm")
        own = Average() if node.op == "call_module" else average  # a module's is read at every call
        self._make(node, Averaging(self.value[source], own))

    def _make(self, node: fx.Node, made: Node) -> None:
        self.made[node], self.value[node] = made, node

    def _pass(self, node: fx.Node) -> None:
        """Give `node` the value that it reads."""
        self.value[node] = self.value[node.args[0]]
        if node.op == "call_module":
            self.bypassed.add(node.target)

    def _made(self, node: fx.Node) -> Node | None:
        return self.made.get(self.value.get(node))

    def _is_sole(self, node: fx.Node) -> bool:
        """Whether a value, under all of its names, has one reader."""
        return all(len(name.users) == 1 for name, value in self.value.items() if value is self.value[node])

    def _drop(self, node: fx.Node) -> None:
        if self.drop_path or not self._is_sole(node.args[0]):
            raise NoProgram("a drop path beside another, or beside another reader")
        self._pass(node)
        self.drop_path = node.target
        self.dropped.add(node)

    def _norm(self, node: fx.Node, module: nn.Module) -> None:
        if reason := norms.why_not(module):
            raise NoProgram(reason)
        inner = norms.activation_of(module)
        act = act_of(inner)
        if inner is not None and act is None and type(inner) not in (nn.Identity, nn.ReLU):
            raise NoProgram(f"a norm with an activation of class {type(inner).__name__}")
        if inner is not None:
            self.bypassed |= {f"{node.target}.{name}" for name, _ in module.named_children()}
        self._make(node, Normalisation(self.value[node.args[0]], Norm(), type(inner) is nn.ReLU, act=act))

    def _relu(self, node: fx.Node) -> None:
        """A ReLU belongs to the norm or the addition before it, which nobody else may read; it may work in place."""
        made = self._made(node.args[0])
        bare = isinstance(made, Addition) or self._is_bare(made)
        if not bare or made.relu or not self._is_sole(node.args[0]):
            raise NoProgram("a ReLU of something but a batch norm or an addition")
        self._pass(node)
        self.made[self.value[node]] = dataclasses.replace(made, relu=True)

    def _activation(self, node: fx.Node, act: Act) -> None:
        """Another activation belongs to the norm before it in the same way; behind an addition it is stock's."""
        made = self._made(node.args[0])
        if not self._is_bare(made) or not self._is_sole(node.args[0]):
            raise NoProgram("an activation other than ReLU of something but a batch norm")
        self._pass(node)
        self.made[self.value[node]] = dataclasses.replace(made, act=act)

    @staticmethod
    def _is_bare(made: Node | None) -> bool:
        """Whether that is a batch norm with nothing behind it."""
        return isinstance(made, Normalisation) and not made.relu and made.act is None

    def _addition(self, node: fx.Node, inplace: bool) -> None:
        if len(node.args) != 2 or node.kwargs or not self.value.keys() >= set(node.args):
            raise NoProgram("an addition of something but two values")
        able = [node.args[i] for i in (0, 1) if self._is_branch(node.args[i]) and node.args[1 - i] not in self.dropped]
        if not able:
            raise NoProgram(
                "an addition to something that is neither a convolution nor a batch norm, or is read elsewhere too"
            )
        branch = node.args[0] if inplace else max(able, key=self._depth)  # the first of equals
        if branch not in able:
            raise NoProgram("an addition in place to what others may read")
        other_first = branch is not node.args[0]
        other = node.args[0] if other_first else node.args[1]
        self.inplace.add(inplace)
        sampled = branch in self.dropped
        self._make(node, Addition(self.value[branch], self.value[other], False, sampled, other_first))

    def _is_branch(self, node: fx.Node) -> bool:
        made = self._made(node)
        return (self._is_bare(made) or isinstance(made, Convolution)) and self._is_sole(node)

    def _depth(self, node: fx.Node) -> int:
        """How many nodes make a value, along what stock's operations take first."""
        value, depth = self.value[node], 0
        while value in self.made:
            value, depth = self.made[value].reads[0], depth + 1
        return depth
