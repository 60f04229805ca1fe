"""What flows through a program's steps: values forward, gradients by value number backward.

A value's second reader adds its gradient to that of the first, in the kernel that writes it where there is one that
adds. A gradient that autograd lent, or that two values share, is never written to: :class:`Pending` says whose it is.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..backends import run
from . import pointwise
from .batch_norm import Affine, Coefficients, Statistics
from .layout import Moments
from .lazy import EVERY, Folded, Lazy, LazyGrad, Pending, Value
from .program import Program
from .running import Update
from .saved import Source
from .spec import StepGrads, StepTensors


@dataclasses.dataclass
class Handed:
    """Mean and second moment of the value that enters a program, where whoever wrote it has them, and of what leaves.

    They are those of one tensor as it was written: only for values that nobody else can hold, see :class:`.Placed`.
    `owned`: what enters is such a value, whose memory evaluation may use. `into`: where it may write what leaves.
    `source`: what makes again what leaves, see :mod:`.remade`.
    """

    entering: Moments | None = None
    owned: bool = False
    into: Tensor | None = None
    leaving: Moments | None = None
    source: Source | None = None


class _Flow:
    """What both directions of one call have; dictionaries are by value number."""

    values: list[Value | None]

    def __init__(self, program: Program, tensors: list[StepTensors], sample_factor: Tensor | None) -> None:
        self.program, self.backend, self.sample_factor = program, program.backend, sample_factor
        self.tensors = [*(StepTensors(None) for _ in range(program.inputs)), *tensors]
        self.masks: dict[int, Tensor] = {}  # bits of what a ReLU let pass, of values whose kernel wrote them
        #: Of pooled values: the place in each window; of averages behind a convolution: what that read.
        self.winners: dict[int, Tensor] = {}
        self.folded: dict[int, Folded] = {}  # norms whose convolution was never written
        self.activated: dict[int, Lazy] = {}  # what norms with an activation but ReLU read, whose values are written
        self._left = [len(readers) for readers in program.every_reader]
        self._written: dict[int, Tensor] = {}  # activations written for convolutions, each until its last reader had it

    def tensor(self, number: int) -> Tensor:
        """A value as a tensor, for a step that reads it once."""
        self._left[number] -= 1
        value = self.values[number]
        if not isinstance(value, Lazy):
            return value
        made = self._written.pop(number, None)
        made = value.materialise(self.backend) if made is None else made
        if self._left[number] > 0:
            self._written[number] = made
        return made


class Forward(_Flow):
    """The values of one call, as its steps make them."""

    def __init__(
        self,
        program: Program,
        inputs: tuple[Tensor, ...],
        tensors: list[StepTensors],
        sample_factor: Tensor | None,
        wanted: list[bool],
    ) -> None:
        """`wanted`: of each value, whether a gradient goes through it."""
        super().__init__(program, tensors, sample_factor)
        self.wanted = wanted
        self.values = [*inputs, *(None for _ in program.nodes)]
        self.output: Tensor | None = None
        self.statistics: dict[int, Update] = {}  # by norm: what moves the running statistics once all is done
        self.emitted: dict[int, Moments] = {}  # mean and second moment, by a kernel that wrote the value
        self.affine: dict[int, tuple[Affine, Statistics]] = {}  # the same of a norm, with what it makes of them

    def note(self, norm: int, statistics: Statistics | None) -> None:
        """What the batch norm that makes value `norm` saw of the batch, if it looked."""
        if statistics is not None:
            self.statistics[norm] = (self.tensors[norm], self.program.maker(norm).norm, *statistics)


class Backward(_Flow):
    """The gradients of one call, by value number."""

    def __init__(
        self,
        program: Program,
        values: list[Value | None],
        tensors: list[StepTensors],
        sample_factor: Tensor | None,
        needs: list[StepGrads],
        needs_inputs: tuple[bool, ...],
        shapes: list[torch.Size | None],
    ) -> None:
        """`values`: those that were kept; `shapes`: of the others too. `needs`: of each node's tensors, which want a
        gradient."""
        super().__init__(program, tensors, sample_factor)
        self.values, self._shapes = values, shapes
        #: Whether a gradient that we own is written over by the one before a norm: on a CPU, whose loops take no bits.
        self.in_place = True
        self.needs = [*(StepGrads() for _ in range(program.inputs)), *needs]
        self.grads = [StepGrads() for _ in self.tensors]  # of the parameters, by the value that they make
        self.wanted = program.wanted(needs, needs_inputs)
        self.through: dict[int, Tensor] = {}  # sums of gradients that have passed the ReLU before a value already
        self._pending: dict[int, Pending] = {}

    def like(self, number: int, grad: Tensor) -> Tensor:
        """A tensor of the shape of a value, whose elements are nobody's business; of the kind of `grad`."""
        value = self._kept(number)
        return _empty(self._shapes[number], grad) if value is None else value

    def shape(self, number: int) -> torch.Size:
        """The shape of a value."""
        value = self._kept(number)
        return self._shapes[number] if value is None else value.shape

    def _kept(self, number: int) -> Tensor | None:
        value = self.values[number]
        return value.z if isinstance(value, Lazy) else value

    def take(self, number: int, corrected: bool = False) -> Pending | None:
        """The gradient of a value as it is, or `corrected`; the caller has it then. None: nobody wants one."""
        known = self._pending.pop(number, None)
        return self._completed(number, known) if corrected and known is not None and known.correction else known

    def take_to_add(self, number: int) -> Tensor | None:
        """The gradient of a value, if it may be written to and nothing is to be done to it; else it stays pending."""
        known = self._pending.get(number)
        if known is None or not known.owned or known.pixels != EVERY or isinstance(known.grad, LazyGrad):
            return None
        if known.mask is not None or known.correction is not None:
            return None
        return self._pending.pop(number).grad

    def give(self, number: int, grad: Pending) -> None:
        """A gradient of a value from one of its readers; added to what there is."""
        if not self.wanted[number]:
            return
        known = self._pending.pop(number, None)
        if known is not None:
            in_one = self._masked_sum(known, grad)
            grad = self._added(number, known, grad) if in_one is None else in_one
        self._pending[number] = grad

    def _masked_sum(self, masked: Pending, other: Pending) -> Pending | None:
        """The sum of a tensor that is still to be masked and another tensor, where one pass of a GPU makes it."""
        if self.in_place or masked.mask is None or other.mask is not None:
            return None
        if not (_is_whole(masked) and _is_whole(other)):
            return None
        options = {"residual": other.grad, "mask": masked.mask}
        return Pending(run("lazy_grad_apply", masked.grad, None, None, **options, backend=self.backend))

    def _added(self, number: int, known: Pending, grad: Pending) -> Pending:
        known, grad = self._completed(number, known), self._completed(number, grad)
        if known.pixels != grad.pixels and EVERY not in (known.pixels, grad.pixels):
            known = _spread(known, self.shape(number))
        return _sum(known, grad)

    def dense(self, number: int) -> Pending | None:
        """The gradient of a value at all pixels, a tensor or a :class:`LazyGrad`; the caller has it then."""
        known = self.take(number)
        if known is None:
            return None
        known = self._completed(number, known)
        return known if known.pixels == EVERY else _spread(known, self.shape(number))

    def _completed(self, number: int, grad: Pending) -> Pending:
        """With what is still to be done to it."""
        if grad.mask is not None:
            masked = run("norm_add_relu_backward", grad.grad, mask=grad.mask, backend=self.backend)[0]
            grad = grad._replace(grad=masked, owned=True, mask=None)
        if grad.correction is not None:
            arguments = (as_lazy(grad), self.values[number], None, None, self.backend, grad.pixels)
            corrected, _ = pointwise.input_grad(*arguments, correction=grad.correction)
            grad = grad._replace(grad=corrected, owned=True, correction=None)
        return grad


def as_lazy(grad: Pending) -> LazyGrad:
    """A gradient as the 1x1 ops take it."""
    known = isinstance(grad.grad, LazyGrad)
    return grad.grad if known else LazyGrad(grad.grad, None, Coefficients(), None, mask=grad.mask)


def _is_whole(grad: Pending) -> bool:
    """Whether a gradient is a tensor of all pixels, but for a mask."""
    return grad.correction is None and grad.pixels == EVERY and not isinstance(grad.grad, LazyGrad)


def _empty(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _spread(grad: Pending, shape: torch.Size) -> Pending:
    """A gradient of some pixels as one of all."""
    full = _empty(shape, grad.grad).zero_()
    full[:, :, :: grad.pixels[0], :: grad.pixels[1]] = grad.grad
    return Pending(full)


def _sum(a: Pending, b: Pending) -> Pending:
    """Two gradients of one value; in place where one may be written to, of all pixels where one of them is."""
    takes = a.owned or not b.owned if a.pixels == b.pixels else a.pixels == EVERY
    into, other = (a, b) if takes else (b, a)
    if into.pixels == other.pixels:
        total = into.grad.add_(other.grad) if into.owned else into.grad + other.grad
        return Pending(total, True, into.pixels)
    total = into.grad if into.owned else into.grad.clone()
    total[:, :, :: other.pixels[0], :: other.pixels[1]].add_(other.grad)
    return Pending(total)
