"""What self-check cases are made of: random tensors on a coarse grid, poison around every one.

Values are eighths and sixteenths, so that every product and sum is exact in float32 and in float64: the sign of a
pre-activation, and with it a mask, is then the same however a kernel orders its arithmetic.
"""

from __future__ import annotations

import dataclasses

import torch

from ...ops import stat_dtype
from ..cards import Card

Tensor = torch.Tensor

ODD = (2, 7, 5, 3)
TAIL = (3, 40, 9, 7)
FLANK = 64  # elements of poison on both sides of every input; keeps its 16-byte alignment


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call, on the CPU and in float64 where they are floating."""

    name: str
    args: tuple
    kwargs: dict
    #: By position or name: the dtype of a tensor, and whether its address is a multiple of 16; else as `place` says.
    likes: dict = dataclasses.field(default_factory=dict)
    card: Card | None = None  # that launches are shaped for; None: the device's own

    @property
    def fills_gpus(self) -> bool:
        """Whether there are as many pixels as a GPU needs to be given the largest tiles."""
        return any(isinstance(t, Tensor) and t.dim() == 4 and t[:, 0].numel() > 2**14 for t in self.args[:1])


class Draw:
    """Random tensors on a grid, from a generator of its own: the global random state stays untouched."""

    def __init__(self, shape: tuple[int, int, int, int]):
        self.shape = shape
        self.generator = torch.Generator("cpu").manual_seed(0)

    def _grid(self, shape, steps: int, step: float) -> Tensor:
        drawn = torch.randint(-steps, steps + 1, tuple(shape), generator=self.generator, device="cpu")
        return drawn.to(torch.float64) * step

    def data(self, shape=None) -> Tensor:
        """Activations: multiples of 1/8 in [-4, 4]."""
        return self._grid(shape or self.shape, 32, 0.125).contiguous(memory_format=torch.channels_last)

    def vector(self, size: int | None = None) -> Tensor:
        """A per-channel vector: multiples of 1/16 in [-2, 2]."""
        return self._grid((size or self.shape[1],), 32, 0.0625)

    def factor(self) -> Tensor:
        """A per-sample factor: one sample is dropped, the others are scaled by two."""
        factor = torch.full((self.shape[0],), 2.0, dtype=torch.float64, device="cpu")
        factor[0] = 0.0
        return factor

    def far_from_zero(self, dtype: torch.dtype) -> Tensor:
        """Activations with a mean of 64 and a deviation of 256 units in its last place, of float32's for float64."""
        noise = torch.randn(self.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        wide = 64 + noise * (64 * 256 * max(torch.finfo(dtype).eps, 2**-23))
        return wide.to(dtype).double().contiguous(memory_format=torch.channels_last)


def place(case: Case, dtype: torch.dtype, device: torch.device) -> Case:
    """The case on `device`, activations in `dtype` and vectors in the dtype of statistics, poison around every one."""

    def move(key, value):
        if isinstance(value, list):
            return [move(None, one) for one in value]
        if not isinstance(value, torch.Tensor):
            return value
        kept, aligned = case.likes.get(key, (None, True))
        if value.is_floating_point():
            if kept is None or dtype == torch.float64:  # what is compared with is float64 throughout
                kept = dtype if value.dim() == 4 else stat_dtype(dtype)
        else:
            kept = value.dtype
        return surrounded(value, aligned, kept, device)

    args = tuple(move(index, value) for index, value in enumerate(case.args))
    return dataclasses.replace(case, args=args, kwargs={key: move(key, value) for key, value in case.kwargs.items()})


def span(t: Tensor) -> int:
    """Elements from the first to the last in memory: `t` may be a slice, with others between its own."""
    return 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def surrounded(
    t: Tensor, aligned: bool = True, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """`t` inside a larger buffer of NaN (255 for bytes), so that a read beyond its ends, or between, shows.

    In the strides of `t`, of `dtype` and on `device`, or its own.
    """
    dtype, device = dtype or t.dtype, device or t.device
    poison = torch.nan if t.is_floating_point() else 255
    front = FLANK if aligned else FLANK + 1
    buffer = torch.full((span(t) + front + FLANK,), poison, dtype=dtype, device=device)
    return buffer.as_strided(t.shape, t.stride(), front).copy_(t)
