"""Steps of a program in evaluation: forward only, with running statistics; :mod:`..plan.lower_evaluation` chooses them.

============================  =========================================================================================
:class:`FoldedConvolution`    a convolution, the norm that alone reads it in its weight; sum and ReLU in its epilogue
:class:`WinogradConvolution`  the same of 3x3 convolutions, by fewer multiplications
:class:`UnfoldedConvolution`  the same where the weight is read as it is: 1x1, or of few pixels
:class:`NormValue`            batch norm as a value ``scale*z + shift``: nothing is written
:class:`NormPass`             such a value, and a sum behind it, written in one pass
:class:`RawPool`              such a value, clamped and pooled in one pass
:class:`StockNorm`            a batch norm with nothing behind it
:class:`StockPool`            a max pool of a tensor
:class:`RawAverage`           an average pool of such a value, clamped, in one pass
:class:`StockAverage`         an average pool of a tensor
============================  =========================================================================================

A whole stem's is in :mod:`.stem_evaluation`, those of activations but ReLU in :mod:`.activated_evaluation`, those for
GPUs alone in :mod:`.gpu_evaluation_kinds`. Each names values by their numbers in the program.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import bounds, onednn, run
from ..ops import activation
from . import stock, winograd
from .conv import channels_last
from .evaluation_flow import Evaluation, ForwardStep, Raw, parts
from .folding import Folded, Part
from .spec import Act, Conv


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfFolded(ForwardStep):
    """A convolution with a weight that is kept: the part `folded`."""

    folded: Part
    conv: Conv

    @property
    def part(self) -> Part:
        return self.folded

    @property
    def normed(self) -> bool:
        return self.folded.norm is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldedConvolution(_OfFolded):
    """The convolution `folded`, by oneDNN; `in_place`: the sum is made in the memory of `other`.

    `act`: an activation but ReLU behind its norm, in its epilogue too where that is exact.
    """

    in_place: bool
    act: Act | None = None

    @property
    def word(self) -> str:
        return "convolution" if self.act is None else f"convolution with {self.act}"

    @property
    def asks_bound(self) -> bool:
        """Whether its epilogue depends on a bound of what it reads."""
        return self.relu or (self.act is not None and onednn.needs_bound(self.act.code))

    def forward(self, e: Evaluation, made: Folded) -> None:
        x, other = e.values[self.source], None if self.other is None else e.values[self.other]
        in_place = self.in_place or e.may_take(self)
        if e.direct and (other is None or in_place or not onednn.is_mapped(other)):
            e.bound(self, made.enlarges, made.bound)
            settings = self.conv, self.relu, e.bounds[self.value], other, in_place
            act = None if self.act is None else self.act.args
            e.values[self.value] = onednn.conv_packed(x, made.weight, made.shift, *settings, act)
            return
        if e.bounds is not None:
            self._note(e, x, other, made)
        settings = (*self.conv.args, self.relu)
        if in_place:
            run("conv_add_relu_", other, x, made.weight, made.shift, *settings, backend=e.backend)
        else:
            other = run("conv_add_relu", x, made.weight, made.shift, other, *settings, backend=e.backend)
        if e.bounds is not None:
            e.bounds[self.value] = bounds.noted(other)
        e.values[self.value] = other if self.act is None else activation.value(other, *self.act.args, inplace=True)

    def _note(self, e: Evaluation, x: Tensor, other: Tensor | None, made: Folded) -> None:
        """Note the bounds of all that the op reads, so that it need not measure them."""
        bounds.remember(x, e.bounds[self.source])
        if made.shift is not None:
            bounds.remember(made.shift, made.bound)
        if other is not None:
            bounds.remember(other, e.bounds[self.other])


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinogradConvolution(_OfFolded):
    """The 3x3 convolution `folded` by minimal filtering, with tiles of `outputs` x `outputs` outputs."""

    ops: ClassVar[tuple[str, ...]] = ("winograd_conv3x3_add_relu", "winograd_weight3x3")

    outputs: int

    @property
    def word(self) -> str:
        return f"Winograd F({self.outputs}x{self.outputs}) convolution"

    def forward(self, e: Evaluation, made: Folded) -> None:
        other = None if self.other is None else e.values[self.other]
        weight, transformed, stride = e.own(self.folded.conv).weight, made.weight, self.conv.stride[0]
        if made.layout != winograd.layout(self.outputs, self.conv):  # nothing is kept: folded for this call alone
            weight = made.weight
            transformed = run("winograd_weight3x3", weight, None, self.outputs, stride, backend=e.backend)
        settings = self.conv.padding[0], self.relu, stride
        arguments = (e.values[self.source], weight, transformed, made.scale, made.shift, other, *settings)
        e.values[self.value] = e.run("winograd_conv3x3_add_relu", *arguments)
        e.bound(self, made.enlarges, made.bound)


def dense(weight: Tensor) -> Tensor:
    """`weight`, or a copy of one that is neither contiguous nor in channels_last."""
    is_dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return weight if is_dense else weight.contiguous()


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnfoldedConvolution(ForwardStep):
    """The convolution of `main`, its norm if there is one, sum and ReLU, with nothing made of the weight.

    `few`: its pixels. `in_place`: the sum is made in the memory of `other`.
    """

    ops: ClassVar[tuple[str, ...]] = ("conv_norm_add_relu", "conv_norm_add_relu_")

    main: Part
    conv: Conv
    few: bool
    in_place: bool

    @property
    def word(self) -> str:
        return "convolution of few pixels" if self.few else "unfolded 1x1 convolution"

    @property
    def normed(self) -> bool:
        return self.main.norm is not None

    def forward(self, e: Evaluation, made: None) -> None:
        weight = dense(e.own(self.main.conv).weight)
        other, out = None if self.other is None else e.values[self.other], None
        if self.value == e.program.output and e.into is not None:
            out = e.into
        elif other is not None and (self.in_place or e.may_take(self)):
            out = other
        read = e.values[self.source], weight, *e.behind(self.main), None if out is other else other
        settings = *self.conv.args[:3], self.relu
        if out is not None:
            e.run("conv_norm_add_relu_", out, *read, *settings, out is other)
            bounds.remember(out, math.inf)  # what was noted is of what it held
        else:
            out = e.run("conv_norm_add_relu", *read, *settings)
        e.values[self.value] = out
        if e.bounds is not None:
            e.bounds[self.value] = math.inf  # to know one, the weight would have to be read


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
        if made is not None:
            e.bound(self, made.enlarges, made.bound)


class NormPass(ForwardStep):
    """The :class:`Raw` `source` and the sum behind it, written."""

    word = "pass"
    normed = True
    ops = ("norm_add_relu",)

    def forward(self, e: Evaluation, made: None) -> None:
        other = () if self.other is None else parts(e.values[self.other])
        out, _ = run("norm_add_relu", *e.values[self.source], *other, relu=self.relu, backend=e.backend)
        e.values[self.value] = out
        e.bound(self, 1.0, 0.0)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawAverage(ForwardStep):
    """An average pool of the :class:`Raw` of a norm with ReLU, in one pass; `value` may be that of the norm.

    Then what a convolution reads is averaged before it, by `average`, the node that makes that value.
    """

    word = "ReLU and average in one pass"
    ops = ("norm_relu_avg_pool",)

    average: int

    def forward(self, e: Evaluation, made: None) -> None:
        average = e.program.maker(self.average).average
        settings = (average.kernel, average.stride)
        e.values[self.value] = run("norm_relu_avg_pool", *e.values[self.source], *settings, backend=e.backend)
        if e.bounds is not None:
            e.bounds[self.value] = e.bounds[self.source]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StockAverage(ForwardStep):
    """An average pool of a tensor by ATen; `average`: as of :class:`RawAverage`."""

    word = "average"

    average: int

    def forward(self, e: Evaluation, made: None) -> None:
        average = e.program.maker(self.average).average
        e.values[self.value] = channels_last(F.avg_pool2d(e.values[self.source], *average.args))
        e.bound(self, 1.0 if average.divisor_override is None else math.inf, 0.0)


class StockPool(ForwardStep):
    """A max pool by ATen."""

    word = "pool"

    def forward(self, e: Evaluation, made: None) -> None:
        args = e.program.maker(self.value).pool.args
        e.values[self.value] = channels_last(F.max_pool2d(e.values[self.source], *args))
        if e.bounds is not None:
            e.bounds[self.value] = e.bounds[self.source]
