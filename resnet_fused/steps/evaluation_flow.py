"""What flows between the steps of a program in evaluation, what every step is, and how they are run in order."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..backends import bounds, run
from ..ops import stat_dtype
from .batch_norm import running_affine
from .folding import Folded, Part
from .program import Call, Program
from .spec import StepTensors


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
        self.into: Tensor | None = None  # where the step that makes the output may write it
        self.dying: tuple[int, ...] = ()  # what nobody reads after the step that runs
        self._filled: dict[tuple[float, int], Tensor] = {}

    def run(self, op: str, *arguments: object) -> Tensor | None:
        """What `op` makes."""
        if self.direct:
            return getattr(torch.ops.resnet_fused, op).default(*arguments)
        return run(op, *arguments, backend=self.backend)

    def bound(self, step: ForwardStep, enlarges: float, shift: float) -> None:
        """Note a bound of what `step` made: so many times what it read, a shift, and what it added."""
        if self.bounds is not None:
            added = 0.0 if step.other is None else self.bounds[step.other]
            self.bounds[step.value] = bounds.of_sum(enlarges, self.bounds[step.source], shift, added)

    def may_take(self, step: ForwardStep) -> bool:
        """Whether a step that runs may write its sum over the program's input, which nobody else has or will read."""
        return self.owned and step.other == 0 != step.source and 0 in self.dying

    def own(self, value: int) -> StepTensors:
        """The tensors of the node that makes `value`."""
        return self.tensors[value - self.program.inputs]

    def behind(self, part: Part) -> tuple:
        """What follows the convolution of `part` in the ops that fold nothing: bias, batch norm's four vectors, eps."""
        norm, eps = StepTensors(None), 1.0
        if part.norm is not None:
            norm, eps = self.own(part.norm), self.program.maker(part.norm).norm.eps
        vectors = self.own(part.conv).bias, norm.running_mean, norm.running_var, norm.gamma, norm.beta
        return *(t if t is None or t.is_contiguous() else t.contiguous() for t in vectors), eps

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


class Lowered(NamedTuple):
    """A program's steps in evaluation; `dead`: after each, the values that nobody reads any more."""

    program: Program
    steps: tuple
    dead: tuple[tuple[int, ...], ...]
    measured: tuple[bool, ...]  # of each input, whether a ReLU in oneDNN's epilogue depends on its bound
    folded: tuple[int, ...]  # the nodes from whose parameters a step on a CPU is made, see `part`

    def run(self, e: Evaluation, made: list[Folded | None]) -> Tensor:
        """The output. `made`: for each step, what it is made from, see `part`."""
        for step, own, dead in zip(self.steps, made, self.dead, strict=True):
            e.dying = dead
            step.forward(e, own)
            for value in dead:
                e.values[value] = None
        return e.values[self.program.output]
