"""The static side of a program: geometry and settings of its nodes, and their tensors by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import activation


@dataclasses.dataclass(frozen=True)
class Conv:
    """Geometry of a convolution, as in ``torch.nn.functional.conv2d``."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def args(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether this is a matrix product over pixels: 1x1, dense, no padding (any stride)."""
        return tuple(weight.shape[2:]) == (1, 1) and self.groups == 1 and self.padding == (0, 0)


@dataclasses.dataclass(frozen=True)
class Norm:
    """Settings of a batch norm. `batch_stats`: normalise with this batch; else with the running statistics."""

    eps: float = 1e-5
    momentum: float | None = 0.1
    batch_stats: bool = True


@dataclasses.dataclass(frozen=True)
class Pool:
    """A max pool, as in ``torch.nn.functional.max_pool2d``; no dilation, sizes rounded down."""

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)

    @property
    def args(self) -> tuple:
        return self.kernel, self.stride, self.padding


@dataclasses.dataclass(frozen=True)
class Average:
    """An average pool, as in ``torch.nn.functional.avg_pool2d``."""

    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    @property
    def args(self) -> tuple:
        return self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor_override

    def sizes(self, shape: Sequence[int]) -> list[int]:
        """Height and width of the averages of ``[N, C, H, W]``."""
        found = []
        for length, k, s, p in zip(shape[2:], self.kernel, self.stride, self.padding, strict=True):
            size = (length + 2 * p - k) // s + 1
            left = (length + 2 * p - k) % s
            found.append(size + 1 if self.ceil_mode and left and size * s < length + p else size)
        return found

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Whether each average is that of a whole window within the image, ``[N, C, H, W]``."""
        if self.padding != (0, 0) or self.divisor_override is not None:
            return False
        down = dataclasses.replace(self, ceil_mode=False)
        return not self.ceil_mode or self.sizes(shape) == down.sizes(shape)


@dataclasses.dataclass(frozen=True)
class Act:
    """An activation other than ReLU, see `ops.activation`: its code, and the slope of a leaky ReLU."""

    code: int
    slope: float = 0.0

    @property
    def args(self) -> tuple[int, float]:
        return self.code, self.slope

    def __str__(self) -> str:
        name = activation.NAMES[self.code]
        return f"{name} {self.slope:g}" if self.code == activation.LEAKY_RELU else name


class StepTensors(NamedTuple):
    """The tensors of a node: a convolution has the first two, a batch norm the others, an addition or a pool none."""

    weight: Tensor | None  # [K, C/groups, R, S]
    bias: Tensor | None = None  # [K]
    gamma: Tensor | None = None  # [K]
    beta: Tensor | None = None  # [K]
    running_mean: Tensor | None = None  # [K]
    running_var: Tensor | None = None  # [K]
    num_batches_tracked: Tensor | None = None  # [], int64

    def cast(self, dtype: torch.dtype | None) -> StepTensors:
        """With the convolution's parameters in `dtype`, as autocast has them; None: as they are."""
        if dtype is None:
            return self
        weight, bias = (None if t is None else t.to(dtype) for t in (self.weight, self.bias))
        return self._replace(weight=weight, bias=bias)


def flatten(steps: Iterable[StepTensors]) -> list[Tensor | None]:
    """All tensors of all steps in one list, as ``autograd.Function.apply`` wants them."""
    return [tensor for step in steps for tensor in step]


def regroup(flat: Sequence[Tensor | None]) -> list[StepTensors]:
    """Inverse of :func:`flatten`."""
    width = len(StepTensors._fields)
    return [StepTensors(*flat[i : i + width]) for i in range(0, len(flat), width)]


Places = tuple[int | None, ...]


def present(flat: Iterable[Tensor | None]) -> tuple[list[Tensor], Places]:
    """The tensors among `flat`, and of each place there which of them it has: autograd's nodes take time for others."""
    found, places = [], []
    for t in flat:
        places.append(None if t is None else len(found))
        found += [] if t is None else [t]
    return found, tuple(places)


def spread(found: Sequence, places: Places) -> list:
    """Inverse of :func:`present`."""
    return [None if i is None else found[i] for i in places]


class StepGrads(NamedTuple):
    """Gradients of the tensors of one step that can have one."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
