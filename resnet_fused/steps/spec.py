"""The static side of a chain: geometry and settings of its steps, and their tensors by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor


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
class Step:
    """One convolution and the batch norm behind it."""

    conv: Conv
    norm: Norm


@dataclasses.dataclass(frozen=True)
class Chain:
    """A program of steps: ``conv-bn-relu`` for all but the last, then ``conv-bn (+ residual) (-> relu)``.

    `shortcut` is the projection that makes the residual from the chain's input; without it the residual, if any, is a
    tensor, or the chain's input itself where `identity`. `relu`: whether the output is clamped. `gram`: the last step,
    and the shortcut where `gram_shortcut`, are Gram joins. `lazy`: 1x1 convolutions normalise on load and emit
    statistics (`steps.lazy_join`); the last convolution is then one. `keep`: what a lazy chain writes for a convolution
    that cannot normalise on load is kept for backward, not written again. `one_pass`: both gradients of its narrow 1x1
    convolutions come from one read of theirs (`conv1x1_backward`). `pool`: of the clamped output, in the same
    pass (a stem: no residual, a plain join). `stock`: none of this, but stock's operations. `backend`: who runs the
    ops, forward and backward.
    """

    steps: tuple[Step, ...]
    shortcut: Step | None = None
    relu: bool = True
    identity: bool = False
    gram: bool = False
    gram_shortcut: bool = False
    lazy: bool = False
    keep: bool = False
    one_pass: bool = False
    pool: Pool | None = None
    stock: bool = False
    backend: str = "auto"

    @property
    def from_input(self) -> bool:
        """Whether the residual comes from the chain's input, so that the input's gradient has two parts."""
        return self.identity or self.shortcut is not None

    @property
    def all_steps(self) -> tuple[Step, ...]:
        return self.steps if self.shortcut is None else (*self.steps, self.shortcut)


class StepTensors(NamedTuple):
    """The tensors of one :class:`Step`. `bias` is the convolution's; `gamma` and `beta` are batch norm's.

    Of a program's nodes, a convolution has the first two, a norm the others, an addition none.
    """

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


class StepGrads(NamedTuple):
    """Gradients of the tensors of one step that can have one."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
