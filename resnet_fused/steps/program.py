"""What a block computes: numbered values, and the nodes that make them.

Value 0 is the block's input, value 1 perhaps a residual from outside; then each node makes one of values before it, and
the last node makes the block's output. No node says how it is run: :mod:`..plan.lower` decides that. A norm stands by
itself, so conv-norm-relu and norm-relu-conv (identity mappings, He et al. 2016, https://arxiv.org/abs/1603.05027) are
the same nodes in another order, and a value may have any number of readers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from ..ops.conv_add_relu import output_shape
from .spec import Act, Average, Conv, Norm, Pool, StepGrads, StepTensors

Tensor = torch.Tensor


class _OfOne:
    """A node that reads one value, its `source`."""

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,)


@dataclasses.dataclass(frozen=True)
class Convolution(_OfOne):
    """A convolution of value `source`; its :class:`StepTensors` has a weight and perhaps a bias."""

    source: int
    conv: Conv


@dataclasses.dataclass(frozen=True)
class Normalisation(_OfOne):
    """Batch norm of value `source`, and the ReLU behind it if `relu`; its :class:`StepTensors` has no weight.

    `act`: another activation instead, whose value is written. `sampled`: what batch norm makes is multiplied by a
    factor for each sample, before the ReLU; only of the last node.
    """

    source: int
    norm: Norm
    relu: bool = True
    sampled: bool = False
    act: Act | None = None


@dataclasses.dataclass(frozen=True)
class Addition:
    """``branch + other``, clamped if `relu`; `sampled`: the branch is multiplied by a factor for each sample.

    `other_first`: stock adds the branch to the other, whose memory layout the sum has then.
    """

    branch: int
    other: int
    relu: bool = False
    sampled: bool = False
    other_first: bool = False

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.branch, self.other)


@dataclasses.dataclass(frozen=True)
class Pooling(_OfOne):
    """The max pool of value `source`, a batch norm with ReLU that nobody else reads: the end of a stem."""

    source: int
    pool: Pool


@dataclasses.dataclass(frozen=True)
class Concatenation:
    """The channels of values one after the other: what a dense layer reads, and what a dense block ends in."""

    reads: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Averaging(_OfOne):
    """The average pool of value `source`: the block's input, a batch norm with ReLU, or, last, a 1x1 convolution.

    The last is a transition between dense blocks, whose convolution reads such a norm: both alone.
    """

    source: int
    average: Average


Node = Convolution | Normalisation | Addition | Pooling | Averaging | Concatenation


def reading(node: Node, reads: Iterable[int]) -> Node:
    """`node` with others in the place of the values that it reads."""
    fields = ("branch", "other") if isinstance(node, Addition) else ("source",)
    return dataclasses.replace(node, **dict(zip(fields, reads, strict=True)))


@dataclasses.dataclass(frozen=True)
class Program:
    """The nodes of a block in the order in which stock runs them.

    `inputs`: 1, or 2 with a residual from outside, which the last node, an addition, reads and nobody else. `backend`:
    who runs the ops; `precision`: how exact they are, see :mod:`..backends.precision`. `dense`: what a dense block
    (:func:`.dense.dense_program`) saves, a word of :data:`.dense.SAVES`; empty for all other programs. `prefer`: what
    counts where the two are at odds, "speed" or "memory".
    """

    nodes: tuple[Node, ...]
    inputs: int = 1
    backend: str = "auto"
    precision: str = "default"
    dense: str = ""
    prefer: str = "speed"

    @property
    def output(self) -> int:
        """The value that the last node makes."""
        return self.inputs + len(self.nodes) - 1

    @property
    def numbered(self) -> list[tuple[int, Node]]:
        """The nodes by the values that they make."""
        return list(zip(range(self.inputs, self.output + 1), self.nodes, strict=True))  # enumerate is slow in a graph

    def readers(self, value: int) -> tuple[int, ...]:
        """The values whose nodes read `value`."""
        if torch.compiler.is_compiling():  # which keeps nothing: for this value alone
            return tuple([number for number, node in self.numbered if value in node.reads])
        return self.every_reader[value]

    @property
    def every_reader(self) -> list[tuple[int, ...]]:
        """The same of each value; in a graph that is traced as much work as of one."""
        return self._once("_readers", self._find_readers)

    def _find_readers(self) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = [()] * (self.output + 1)
        for number, node in self.numbered:
            for value in dict.fromkeys(node.reads):
                found[value] += (number,)
        return found

    def _once(self, name: str, find: Callable[[], list]) -> list:
        """What `find` finds, found once; a cached property takes a lock, which no graph can be traced through."""
        known = self.__dict__.get(name)
        if known is None:
            known = find()
            if not torch.compiler.is_compiling():
                self.__dict__[name] = known
        return known

    def maker(self, value: int) -> Node | None:
        """The node that makes `value`; None for an input."""
        return None if value < self.inputs else self.nodes[value - self.inputs]

    def is_affine(self, value: int) -> bool:
        """Whether a value is a batch norm with nothing behind it, which an addition applies as it reads."""
        node = self.maker(value)
        return isinstance(node, Normalisation) and not node.relu and node.act is None

    def is_lazy(self, value: int) -> bool:
        """Whether a value is a batch norm that readers may apply as they read: not one with an activation but ReLU."""
        node = self.maker(value)
        return isinstance(node, Normalisation) and node.act is None

    def meets_batch(self, value: int) -> bool:
        """Whether a norm that normalises with the batch reads a value."""
        norms = [node for node in map(self.maker, self.readers(value)) if isinstance(node, Normalisation)]
        return any(node.norm.batch_stats for node in norms)

    def terms(self, value: int) -> Terms | None:
        """What the join that makes `value` joins; None where that is none: neither a norm nor a sum with one.

        A norm's own value counts, if it is lazy: it is written where the block ends in it.
        """
        node = self.maker(value)
        if isinstance(node, Addition):
            terms = Terms(node.branch, node.other, self.is_affine(node.other), node.relu, node.sampled)
            return terms if self.is_affine(node.branch) else None
        return Terms(value, None, False, node.relu, node.sampled) if self.is_lazy(value) else None

    def wanted(self, needs: list[StepGrads], needs_inputs: tuple[bool, ...]) -> list[bool]:
        """Of each value, whether it, or anything that it is made of, wants a gradient; `needs`: of each node's own."""
        found = list(needs_inputs[: self.inputs])
        for node, need in zip(self.nodes, needs, strict=True):
            found.append(any(need) or any(found[value] for value in node.reads))
        return found

    @property
    def main_convolutions(self) -> list[int]:
        """The nodes of convolutions between input and output along what stock's operations take first.

        They decide the memory layout of stock's result.
        """
        return self._once("_main_convolutions", self._find_main_convolutions)

    def _find_main_convolutions(self) -> list[int]:
        found, value = [], self.output
        while value >= self.inputs:
            node = self.maker(value)
            if isinstance(node, Convolution):
                found.append(value - self.inputs)
            value = node.other if isinstance(node, Addition) and node.other_first else node.reads[0]
        return found

    @property
    def clamped(self) -> bool:
        """Whether the output is what a ReLU made."""
        node = self.nodes[-1]
        return isinstance(node, Normalisation | Addition) and node.relu

    @property
    def batch_stats(self) -> bool:
        """Whether some batch norm normalises with the batch."""
        return any(isinstance(node, Normalisation) and node.norm.batch_stats for node in self.nodes)

    def shapes(self, x: torch.Size, tensors: list[StepTensors]) -> list[torch.Size]:
        """The shape of every value, from that of the input. `tensors`: of each node. A residual has the output's."""
        shapes = [x] * self.inputs
        for node, own in zip(self.nodes, tensors, strict=True):
            shape = shapes[node.reads[0]]
            if isinstance(node, Concatenation):
                shape = torch.Size((shape[0], sum(shapes[value][1] for value in node.reads), *shape[2:]))
            elif isinstance(node, Convolution):
                shape = torch.Size(output_shape(shape, own.weight.shape, *node.conv.args[:3]))
            elif isinstance(node, Pooling):
                shape = torch.Size(output_shape(shape, (shape[1], 1, *node.pool.kernel), *node.pool.args[1:], (1, 1)))
            elif isinstance(node, Averaging):
                shape = torch.Size((*shape[:2], *node.average.sizes(shape)))
            shapes.append(shape)
        if self.inputs > 1:
            shapes[1] = shapes[self.nodes[-1].branch]
        return shapes


class Terms(NamedTuple):
    """What is joined where a batch norm without a reader of its own ends: ``relu(factor * branch + other)``."""

    branch: int  # the value of a batch norm
    other: int | None
    projected: bool  # whether the other is the value of a batch norm too
    relu: bool
    sampled: bool

    @property
    def norms(self) -> list[int]:
        """The values of batch norms that are joined."""
        return [self.branch, self.other] if self.projected else [self.branch]


class Call(NamedTuple):
    """A program on its tensors: what the plan and the node take."""

    program: Program
    x: Tensor  # [N, C, H, W]
    tensors: list[StepTensors]  # of each node
    residual: Tensor | None = None  # value 1, of the shape of the output
    sample_factor: Tensor | None = None  # [N]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The values that come from outside."""
        return (self.x,) if self.program.inputs == 1 else (self.x, self.residual)

    @property
    def convolutions(self) -> list[tuple[int, Convolution, StepTensors]]:
        """Value, node and tensors of each."""
        every = zip(self.program.numbered, self.tensors, strict=True)
        return [(value, node, own) for (value, node), own in every if isinstance(node, Convolution)]

    def shapes(self) -> list[torch.Size]:
        return self.program.shapes(self.x.shape, self.tensors)
