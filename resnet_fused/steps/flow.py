"""What flows through a program's steps: values forward, gradients by value number backward.

A value's second reader adds its gradient to that of the first, in the kernel that writes it where there is one that
adds. A gradient that autograd lent, or that two values share, is never written to: :class:`Pending` says whose it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .lazy import Lazy, LazyGrad
from .program import Program
from .running import Update
from .spec import StepGrads, StepTensors

Tensor = torch.Tensor
Value = Tensor | Lazy
Pixels = tuple[int, int]
EVERY: Pixels = (1, 1)


class _Written:
    """Activations that were written down for convolutions, each until its last reader has had it."""

    def __init__(self, program: Program) -> None:
        self.left = [len(program.readers(value)) for value in range(len(program.nodes) + 1)]
        self.kept: dict[int, Tensor] = {}

    def tensor(self, number: int, value: Value, backend: str) -> Tensor:
        """`value`, which has this number, as a tensor, for one of its readers."""
        self.left[number] -= 1
        if not isinstance(value, Lazy):
            return value
        made = self.kept.pop(number, None)
        made = value.materialise(backend) if made is None else made
        if self.left[number] > 0:
            self.kept[number] = made
        return made


class Forward:
    """The values of one call, as its steps make them."""

    def __init__(
        self,
        program: Program,
        x: Tensor,
        tensors: list[StepTensors],
        sample_factor: Tensor | None,
        wanted: list[bool],
    ) -> None:
        """`wanted`: of each value, whether a gradient goes through it."""
        self.wanted = wanted
        self.program, self.backend, self.sample_factor = program, program.backend, sample_factor
        self.values: list[Value | None] = [x, *(None for _ in program.nodes)]
        self.tensors = [StepTensors(None), *tensors]  # by the value that they make
        self.statistics: list[Update] = []  # what moves the running statistics once all is done
        self.emitted: dict[int, tuple[Tensor, Tensor]] = {}  # mean and second moment, by a kernel that wrote the value
        self.masks: dict[int, Tensor] = {}  # bits of what a ReLU let pass, of values whose kernel wrote them
        self._written = _Written(program)

    def tensor(self, number: int) -> Tensor:
        """A value as a tensor, for a step that reads it once."""
        return self._written.tensor(number, self.values[number], self.backend)


class Pending(NamedTuple):
    """The gradient of a value, as far as its readers have been passed."""

    grad: Tensor | LazyGrad
    owned: bool = True  # whether it may be written to
    pixels: Pixels = EVERY  # the stride of those that it is of; all others' is 0


class Backward:
    """The gradients of one call, by value number."""

    def __init__(
        self,
        program: Program,
        values: list[Value | None],
        tensors: list[StepTensors],
        sample_factor: Tensor | None,
        needs: list[StepGrads],
        needs_x: bool,
        masks: dict[int, Tensor],
        shapes: list[torch.Size],
    ) -> None:
        """`values`: those that were kept. `needs`: of each node's tensors, which want a gradient."""
        self.masks, self.shapes = masks, shapes
        self.program, self.backend, self.sample_factor = program, program.backend, sample_factor
        self.values, self.tensors, self.needs = values, [StepTensors(None), *tensors], [StepGrads(), *needs]
        self.grads = [StepGrads() for _ in self.tensors]  # of the parameters, by the value that they make
        self.wanted = program.wanted(needs, needs_x)
        self._pending: dict[int, Pending] = {}
        self._written = _Written(program)

    def tensor(self, number: int) -> Tensor:
        """A value as a tensor, for a step that read it once."""
        return self._written.tensor(number, self.values[number], self.backend)

    def like(self, number: int, grad: Tensor) -> Tensor:
        """A tensor of the shape of a value, whose elements are nobody's business; of the kind of `grad`."""
        value = self.values[number]
        value = value.z if isinstance(value, Lazy) else value
        return _empty(self.shapes[number], grad) if value is None else value

    def take(self, number: int) -> Pending | None:
        """The gradient of a value; the caller has it then. None: nobody before it wants one."""
        return self._pending.pop(number, None)

    def take_to_add(self, number: int) -> Tensor | None:
        """The gradient of a value, if it may be written to and is of all pixels; else it stays pending."""
        known = self._pending.get(number)
        if known is None or not known.owned or known.pixels != EVERY or isinstance(known.grad, LazyGrad):
            return None
        return self._pending.pop(number).grad

    def give(self, number: int, grad: Pending) -> None:
        """A gradient of a value from one of its readers; added to what there is."""
        if not self.wanted[number]:
            return
        known = self._pending.pop(number, None)
        if known is not None and known.pixels != grad.pixels and EVERY not in (known.pixels, grad.pixels):
            known = _spread(known, self.shapes[number])
        self._pending[number] = grad if known is None else _sum(known, grad)

    def dense(self, number: int) -> Pending | None:
        """The gradient of a value at all pixels; the caller has it then."""
        known = self.take(number)
        return known if known is None or known.pixels == EVERY else _spread(known, self.shapes[number])


def _empty(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _spread(grad: Pending, shape: torch.Size) -> Pending:
    """A gradient of some pixels as one of all."""
    full = _empty(shape, grad.grad).zero_()
    full[:, :, :: grad.pixels[0], :: grad.pixels[1]] = grad.grad
    return Pending(full)


def _sum(a: Pending, b: Pending) -> Pending:
    """Two gradients of one value; in place where one may be written to, of all pixels where one of them is."""
    into, other = (a, b) if _takes_sum(a, b) else (b, a)
    if into.pixels == other.pixels:
        total = into.grad.add_(other.grad) if into.owned else into.grad + other.grad
        return Pending(total, True, into.pixels)
    total = into.grad if into.owned else into.grad.clone()
    total[:, :, :: other.pixels[0], :: other.pixels[1]].add_(other.grad)
    return Pending(total)


def _takes_sum(a: Pending, b: Pending) -> bool:
    """Whether `b` is added to `a` rather than the reverse."""
    if a.pixels != b.pixels:
        return a.pixels == EVERY
    return a.owned or not b.owned
