"""What a block computes: numbered values, and the nodes that make them.

Value 0 is the block's input; node i makes value i + 1 of values before it, and the last node makes the block's output.
No node says how it is run: :mod:`..plan.lower` decides that. A norm stands by itself, so conv-norm-relu and
norm-relu-conv (identity mappings, He et al. 2016, https://arxiv.org/abs/1603.05027) are the same nodes in another
order, and a value may have any number of readers.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from ..ops.conv_add_relu import output_shape
from .spec import Conv, Norm, StepGrads, StepTensors


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of value `source`; its :class:`StepTensors` has a weight and perhaps a bias."""

    source: int
    conv: Conv

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,)


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Batch norm of value `source`, and the ReLU behind it if `relu`; its :class:`StepTensors` has no weight."""

    source: int
    norm: Norm
    relu: bool = True

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,)


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


Node = Convolution | Normalisation | Addition


@dataclasses.dataclass(frozen=True)
class Program:
    """The nodes of a block in the order in which stock runs them. `backend`: who runs the ops."""

    nodes: tuple[Node, ...]
    backend: str = "auto"

    @functools.cached_property
    def _readers(self) -> tuple[tuple[int, ...], ...]:
        reads = [node.reads for node in self.nodes]
        return tuple(
            tuple(number for number, read in enumerate(reads, 1) if value in read) for value in range(len(reads) + 1)
        )

    def readers(self, value: int) -> tuple[int, ...]:
        """The values whose nodes read `value`."""
        return self._readers[value]

    def maker(self, value: int) -> Node | None:
        """The node that makes `value`; None for the block's input."""
        return self.nodes[value - 1] if value else None

    def is_affine(self, value: int) -> bool:
        """Whether a value is a batch norm without ReLU, which an addition applies as it reads."""
        node = self.maker(value)
        return isinstance(node, Normalisation) and not node.relu

    def wanted(self, needs: list[StepGrads], needs_x: bool) -> list[bool]:
        """Of each value, whether it, or anything that it is made of, wants a gradient; `needs`: of each node's own."""
        found = [needs_x]
        for node, need in zip(self.nodes, needs, strict=True):
            found.append(any(need) or any(found[value] for value in node.reads))
        return found

    @functools.cached_property
    def main_convolutions(self) -> tuple[int, ...]:
        """The nodes of convolutions between input and output along what stock's operations take first.

        They decide the memory layout of stock's result.
        """
        found, value = [], len(self.nodes)
        while value:
            node = self.nodes[value - 1]
            if isinstance(node, Convolution):
                found.append(value - 1)
            value = node.other if isinstance(node, Addition) and node.other_first else node.reads[0]
        return tuple(found)

    @property
    def sampled(self) -> bool:
        """Whether some addition takes a factor for each sample."""
        return any(isinstance(node, Addition) and node.sampled for node in self.nodes)

    def shapes(self, x: torch.Size, tensors: list[StepTensors]) -> list[torch.Size]:
        """The shape of every value, from that of the input. `tensors`: of each node."""
        shapes = [x]
        for node, own in zip(self.nodes, tensors, strict=True):
            shape = shapes[node.reads[0]]
            if isinstance(node, Convolution):
                shape = torch.Size(output_shape(shape, own.weight.shape, *node.conv.args[:3]))
            shapes.append(shape)
        return shapes
