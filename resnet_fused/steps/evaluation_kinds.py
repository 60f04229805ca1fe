"""Steps of a program in evaluation: forward only, with running statistics; :mod:`..plan.lower_evaluation` chooses them.

============================  =========================================================================================
:class:`FoldedConvolution`    a convolution, the norm that alone reads it in its weight; sum and ReLU in its epilogue
:class:`WinogradConvolution`  the same of 3x3 convolutions, by fewer multiplications
:class:`FewPixels`            the same where the weight is read as it is
:class:`NormValue`            batch norm as a value ``scale*z + shift``: nothing is written
:class:`NormPass`             such a value, and a sum behind it, written in one pass
:class:`RawPool`              such a value, clamped and pooled in one pass
:class:`StockNorm`            a batch norm with nothing behind it
:class:`StockPool`            a max pool of a tensor
============================  =========================================================================================

Those for GPUs alone are in :mod:`.gpu_evaluation_kinds`. Each names values by their numbers in the program.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch.nn import functional as F

from ..backends import bounds, onednn, run
from ..ops import stat_dtype
from . import stock, winograd
from .batch_norm import running_affine
from .conv import channels_last
from .folding import Folded, Part
from .program import Call, Program
from .spec import Conv, StepTensors

Tensor = torch.Tensor


class Raw(NamedTuple):
    """``scale*z + shift``, of which a ReLU is still to be taken if the norm that it stands for has one."""

    z: Tensor
    scale: Tensor
    shift: Tensor


def parts(value: Tensor | Raw) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A value as the ops take it: tensor, scale, shift."""
    return value if isinstance(value, Raw) else (value, None, None)


class Evaluation:
    """One call: its values as far as they are made, and bounds of them where weights are kept on the CPU.

    `direct`: convolutions are called without dispatch, which would find that the CPU backend runs them.
    """

    def __init__(self, call: Call, inputs: list[Tensor], direct: bool = False) -> None:
        self.program, self.tensors, self.dtype = call.program, call.tensors, call.x.dtype
        self.backend, self.direct = call.program.backend, direct
        self.values: list = inputs + [None] * len(call.program.nodes)
        self.bounds: list[float] | None = None
        self.owned = False  # nobody else has value 0
        self.dying: tuple[int, ...] = ()  # what nobody reads after the step that runs
        self._filled: dict[tuple[float, int], Tensor] = {}

    def own(self, value: int) -> StepTensors:
        """The tensors of the node that makes `value`."""
        return self.tensors[value - self.program.inputs]

    def affine(self, norm: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and shift of a norm; `bias`: of the convolution before it, if its output lacks it."""
        bn = running_affine(self.own(norm), self.program.maker(norm).norm, self.dtype, self.backend, bias)
        return bn.scale, bn.shift

    def filled(self, number: float, weight: Tensor) -> Tensor:
        """A vector of one number for each output of `weight`: made once, as each is a launch."""
        key = number, weight.shape[0]
        if key not in self._filled:
            self._filled[key] = torch.full(key[1:], number, dtype=stat_dtype(self.dtype), device=weight.device)
        return self._filled[key]


@dataclasses.dataclass(frozen=True)
class ForwardStep:
    """What makes `value` of value `source`, and perhaps of value `other`, which is added before a ReLU."""

    ops: ClassVar[tuple[str, ...]] = ()  # those of ours that must have sound kernels
    word: ClassVar[str]  # what ``explain`` calls it
    normed: ClassVar[bool] = False  # whether it does a norm beside

    value: int
    source: int
    other: int | None = None
    relu: bool = False

    @property
    def part(self) -> Part | None:
        """What of the parameters is folded for this step on a CPU, and given to `forward`."""
        return None

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,) if self.other is None else (self.source, self.other)

    @property
    def adds(self) -> bool:
        """Whether it does a sum beside."""
        return self.other is not None

    def forward(self, e: Evaluation, made: Folded | None) -> None:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldedConvolution(ForwardStep):
    """The convolution `folded`, by oneDNN; `in_place`: the sum is made in the memory of `other`."""

    word = "convolution"

    folded: Part
    conv: Conv
    in_place: bool

    @property
    def part(self) -> Part:
        return self.folded

    @property
    def normed(self) -> bool:
        return self.folded.norm is not None

    def forward(self, e: Evaluation, made: Folded) -> None:
        x, other = e.values[self.source], None if self.other is None else e.values[self.other]
        in_place = self.in_place or (e.owned and self.other == 0 != self.source and 0 in e.dying)
        if e.direct and (other is None or in_place or not onednn.is_mapped(other)):
            added = 0.0 if other is None else e.bounds[self.other]
            bound = bounds.of_sum(made.enlarges, e.bounds[self.source], made.bound, added)
            e.bounds[self.value] = bound
            e.values[self.value] = onednn.conv_packed(
                x, made.weight, made.shift, self.conv, self.relu, bound, other, in_place
            )
            return
        if e.bounds is not None:
            self._note(e, x, other, made)
        settings = (*self.conv.args, self.relu)
        if in_place:
            run("conv_add_relu_", other, x, made.weight, made.shift, *settings, backend=e.backend)
        else:
            other = run("conv_add_relu", x, made.weight, made.shift, other, *settings, backend=e.backend)
        e.values[self.value] = other
        if e.bounds is not None:
            e.bounds[self.value] = bounds.noted(other)

    def _note(self, e: Evaluation, x: Tensor, other: Tensor | None, made: Folded) -> None:
        """Note the bounds of all that the op reads, so that it need not measure them."""
        bounds.remember(x, e.bounds[self.source])
        if made.shift is not None:
            bounds.remember(made.shift, made.bound)
        if other is not None:
            bounds.remember(other, e.bounds[self.other])


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinogradConvolution(ForwardStep):
    """The 3x3 convolution `folded` by minimal filtering, with tiles of `outputs` x `outputs` outputs."""

    ops: ClassVar[tuple[str, ...]] = ("winograd_conv3x3_add_relu", "winograd_weight3x3")

    folded: Part
    conv: Conv
    outputs: int

    @property
    def word(self) -> str:
        return f"Winograd F({self.outputs}x{self.outputs}) convolution"

    @property
    def part(self) -> Part:
        return self.folded

    @property
    def normed(self) -> bool:
        return self.folded.norm is not None

    def forward(self, e: Evaluation, made: Folded) -> None:
        other = None if self.other is None else e.values[self.other]
        weight, transformed = e.own(self.folded.conv).weight, made.weight
        if made.layout != winograd.layout(self.outputs):  # nothing is kept: folded for this call alone
            weight = made.weight
            transformed = run("winograd_weight3x3", weight, None, self.outputs, backend=e.backend)
        vectors = made.scale, made.shift
        arguments = (e.values[self.source], weight, transformed, *vectors, other, self.conv.padding[0], self.relu)
        if e.direct:
            e.values[self.value] = torch.ops.resnet_fused.winograd_conv3x3_add_relu.default(*arguments)
        else:
            e.values[self.value] = run("winograd_conv3x3_add_relu", *arguments, backend=e.backend)
        if e.bounds is not None:
            added = 0.0 if self.other is None else e.bounds[self.other]
            e.bounds[self.value] = bounds.of_sum(made.enlarges, e.bounds[self.source], made.bound, added)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewPixels(ForwardStep):
    """The convolution of `main`, its norm if there is one, sum and ReLU, with nothing made of the weight."""

    ops: ClassVar[tuple[str, ...]] = ("conv_norm_add_relu",)
    word = "convolution of few pixels"

    main: Part
    conv: Conv

    @property
    def normed(self) -> bool:
        return self.main.norm is not None

    def forward(self, e: Evaluation, made: None) -> None:
        own, norm, eps = e.own(self.main.conv), StepTensors(None), 1.0
        if self.main.norm is not None:
            norm, eps = e.own(self.main.norm), e.program.maker(self.main.norm).norm.eps
        weight, vectors = own.weight, (own.bias, norm.running_mean, norm.running_var, norm.gamma, norm.beta)
        if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
            weight = weight.contiguous()
        vectors = [t if t is None or t.is_contiguous() else t.contiguous() for t in vectors]
        other = None if self.other is None else e.values[self.other]
        arguments = (e.values[self.source], weight, *vectors, eps, other, *self.conv.args[:3], self.relu)
        if e.direct:
            e.values[self.value] = torch.ops.resnet_fused.conv_norm_add_relu.default(*arguments)
        else:
            e.values[self.value] = run("conv_norm_add_relu", *arguments, backend=e.backend)


@dataclasses.dataclass(frozen=True)
class NormValue(ForwardStep):
    """Batch norm as a :class:`Raw`. `biased`: the convolution before it was run without its bias."""

    word = "norm on load"

    biased: bool = False

    @property
    def part(self) -> Part:
        return Part(norm=self.value)

    def forward(self, e: Evaluation, made: Folded | None) -> None:
        bias = e.own(self.source).bias if self.biased else None
        scale, shift = e.affine(self.value, bias) if made is None else (made.weight, made.shift)
        e.values[self.value] = Raw(e.values[self.source], scale, shift)
        if e.bounds is not None:
            e.bounds[self.value] = bounds.of_sum(made.enlarges, e.bounds[self.source], made.bound)


class NormPass(ForwardStep):
    """The :class:`Raw` `source` and the sum behind it, written."""

    word = "pass"
    normed = True
    ops = ("norm_add_relu",)

    def forward(self, e: Evaluation, made: None) -> None:
        other = () if self.other is None else parts(e.values[self.other])
        out, _ = run("norm_add_relu", *e.values[self.source], *other, relu=self.relu, backend=e.backend)
        e.values[self.value] = out
        if e.bounds is not None:
            added = 0.0 if self.other is None else e.bounds[self.other]
            e.bounds[self.value] = bounds.of_sum(1.0, e.bounds[self.source], 0.0, added)


class StockNorm(ForwardStep):
    """Batch norm by ATen: one launch, where an affine map and a pass would be two."""

    word = "norm"

    def forward(self, e: Evaluation, made: None) -> None:
        settings = e.program.maker(self.value).norm
        out = channels_last(stock.norm(e.values[self.source], e.own(self.value), settings))
        e.values[self.value] = torch.relu_(out) if self.relu else out


class RawPool(ForwardStep):
    """A max pool of the :class:`Raw` of a norm with ReLU, in one pass."""

    word = "ReLU and pool in one pass"
    ops = ("norm_relu_pool",)

    def forward(self, e: Evaluation, made: None) -> None:
        args = e.program.maker(self.value).pool.args
        e.values[self.value] = run("norm_relu_pool", *e.values[self.source], *args, backend=e.backend)[0]


class StockPool(ForwardStep):
    """A max pool by ATen."""

    word = "pool"

    def forward(self, e: Evaluation, made: None) -> None:
        args = e.program.maker(self.value).pool.args
        e.values[self.value] = channels_last(F.max_pool2d(e.values[self.source], *args))
        if e.bounds is not None:
            e.bounds[self.value] = e.bounds[self.source]


class Lowered(NamedTuple):
    """A program's steps in evaluation; `dead`: after each, the values that nobody reads any more."""

    program: Program
    steps: tuple
    dead: tuple[tuple[int, ...], ...]
    measured: tuple[bool, ...]  # of each input, whether a ReLU in oneDNN's epilogue depends on its bound
    folds: bool  # whether a step on a CPU is made from parameters, see `part`

    def run(self, e: Evaluation, made: list[Folded | None]) -> Tensor:
        """The output. `made`: for each step, what it is made from, see `part`."""
        for step, own, dead in zip(self.steps, made, self.dead, strict=True):
            e.dying = dead
            step.forward(e, own)
            for value in dead:
                e.values[value] = None
        return e.values[self.program.output]
