"""Steps of a program in evaluation that only GPUs have: batch norm, sum and ReLU where a tensor is read or written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch

from ..backends import run
from ..ops import conv_chain
from ..ops.conv_chain import Link
from .conv import channels_last
from .evaluation_flow import Evaluation, ForwardStep, Lowered, parts
from .evaluation_kinds import UnfoldedConvolution, dense
from .folding import Part

Tensor = torch.Tensor
aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product(ForwardStep):
    """A 1x1 convolution of stride 1, `main`, with its norm, sum or projection, and ReLU: one kernel.

    `projection`: another convolution, of value `projected`, that is added. `source` and `other` may
    be values that :class:`NormValue` made.
    """

    ops: ClassVar[tuple[str, ...]] = ("conv1x1_join",)
    word = "1x1 convolution"

    main: Part
    projection: Part | None = None
    projected: int | None = None

    @property
    def parts(self) -> tuple[Part | None, ...]:
        """The convolutions, and the norms whose scale and shift a launch before makes."""
        return self.main, self.projection

    @property
    def normed(self) -> bool:
        return self.main.norm is not None

    @property
    def adds(self) -> bool:
        return self.other is not None or self.projection is not None

    @property
    def reads(self) -> tuple[int, ...]:
        return tuple([value for value in (self.source, self.other, self.projected) if value is not None])

    def forward(self, e: Evaluation, made: None) -> None:
        x, *before = parts(e.values[self.source])
        weight, scale, shift = _epilogue(e, self.main)
        other = {}
        if self.projection is not None:
            weight2, scale2, shift2 = _epilogue(e, self.projection)
            other = {"x2": e.values[self.projected], "weight2": weight2, "scale2": scale2, "shift2": shift2}
            other["stride2"] = e.program.maker(self.projection.conv).conv.stride
        elif self.other is not None:
            names = ("residual", "residual_scale", "residual_shift")
            other = dict(zip(names, parts(e.values[self.other]), strict=True))
        arguments = (x, weight, scale, shift, *before)
        e.values[self.value] = run("conv1x1_join", *arguments, **other, relu=self.relu, backend=e.backend)[0]


def _epilogue(e: Evaluation, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of a convolution, and scale and shift of what it gives."""
    own = e.own(part.conv)
    weight = own.weight.contiguous()
    if part.norm is not None:
        return weight, *e.affine(part.norm, own.bias)
    one = e.filled(1.0, weight)
    return weight, one, e.filled(0.0, weight) if own.bias is None else own.bias.to(one.dtype)


class CompiledConvolution(UnfoldedConvolution):
    """The convolution of the compiled library, on tensor cores: with norm, sum and ReLU one launch."""

    word = "compiled convolution"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain(ForwardStep):
    """The compiled convolutions `links`, which are all of a program: one call. `order`: what the op calls `steps`.

    `joined`: the projections among their values, which the kernels of the sums compute too and which are never written.
    """

    ops: ClassVar[tuple[str, ...]] = ("conv_chain",)
    word = "chain"

    links: tuple[CompiledConvolution, ...]
    order: tuple[int, ...]
    joined: frozenset[int]

    @property
    def launched(self) -> tuple[CompiledConvolution, ...]:
        """The convolutions that are launches of their own."""
        return tuple([link for link in self.links if link.value not in self.joined])

    def forward(self, e: Evaluation, made: None) -> None:
        tensors, each_eps = [], []
        for link in self.links:
            *vectors, eps = e.behind(link.main)
            tensors += [dense(e.own(link.main.conv).weight), *vectors]
            each_eps.append(eps)
        residual = None if self.other is None else e.values[self.other]
        e.values[self.value] = e.run("conv_chain", e.values[self.source], residual, tensors, [*self.order], each_eps)


def chained(lowered: Lowered, weights: Mapping[int, torch.Size]) -> Lowered:
    """The steps as one, all of them being compiled convolutions. `weights`: their shapes, by what they make."""
    program, links = lowered.program, lowered.steps
    numbers = {value: value for value in range(program.inputs)}
    numbers |= {link.value: program.inputs + i for i, link in enumerate(links)}
    chain = []
    for link in links:
        added = -1 if link.other is None else numbers[link.other]
        chain.append(Link(numbers[link.source], added, link.relu, *link.conv.args[:3]))
    second = conv_chain.joined(chain, [weights[link.main.conv] for link in links], program.inputs).values()
    joined, order = frozenset(links[i].value for i in second), tuple(n for link in chain for n in link.integers)
    other = 1 if program.inputs > 1 else None
    step = Chain(program.output, 0, other, links=links, order=order, joined=joined)
    return lowered._replace(steps=(step,), dead=((),))


@dataclasses.dataclass(frozen=True)
class ConvolveRaw(ForwardStep):
    """A convolution by ATen. `biased`: with its bias, which else the norm behind it adds.

    `conv`: the value that it makes by itself, where it makes that of an average behind it; None: `value`.
    """

    word = "convolution"

    biased: bool = True
    conv: int | None = None

    def forward(self, e: Evaluation, made: None) -> None:
        number = self.value if self.conv is None else self.conv
        own, (stride, padding, dilation, groups) = e.own(number), e.program.maker(number).conv.args
        bias = own.bias if self.biased else None
        arguments = (e.values[self.source], own.weight, bias, stride, padding, dilation, False, [0, 0], groups)
        e.values[self.value] = channels_last(aten.convolution(*arguments))


class Add(ForwardStep):
    """A sum of two tensors in the memory of `source`, which nobody else reads."""

    word, adds = "sum in place", False

    def forward(self, e: Evaluation, made: None) -> None:
        out = e.values[self.source].add_(e.values[self.other])
        e.values[self.value] = torch.relu_(out) if self.relu else out
