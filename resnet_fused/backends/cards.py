"""The GPU that a launch is shaped for: its own where there is one, an H100 where there is none, or an assumed one.

Host code of the Triton kernels asks :func:`of` for the architecture, which decides tiles, and for the number of
multiprocessors, which decides how many programs share a sum. Neither is asked of the driver twice.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class Card:
    """What the shape of a launch depends on."""

    arch: int = 90  # compute capability as one number
    sms: int = 132  # multiprocessors
    scale: int = 1  # divides every number of programs: a self-check reaches many row tiles and splits in small tensors

    def programs(self, wanted: int) -> int:
        """`wanted` programs on this card: fewer on a card that a self-check assumes."""
        return max(1, wanted // self.scale)

    def small(self) -> Card:
        """The same architecture with two multiprocessors, and as much less of everything else."""
        return Card(self.arch, 2, self.sms // 2)


H100 = Card()
_assumed: contextvars.ContextVar[Card | None] = contextvars.ContextVar("resnet_fused assumed card", default=None)


@contextlib.contextmanager
def assuming(card: Card | None) -> Iterator[None]:
    """Shape launches for `card` within a ``with`` block, in this thread; None: for the device they are for."""
    token = _assumed.set(card)
    try:
        yield
    finally:
        _assumed.reset(token)


def assumed() -> Card | None:
    """The card of the innermost :func:`assuming`, if it names one."""
    return _assumed.get()


def of(device: torch.device) -> Card:
    """The card to shape a launch for."""
    found = _assumed.get()
    if found is not None:
        return found
    if device.type != "cuda":  # the interpreter, or meta tensors
        return H100
    return _card(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _card(index: int) -> Card:
    major, minor = torch.cuda.get_device_capability(index)
    there = torch.cuda.is_available()  # it is not where only fake tensors are planned for
    return Card(
        10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count if there else H100.sms
    )


def aligned(t: torch.Tensor) -> bool:
    """Whether a pointer to `t` is a multiple of 16 bytes, for which Triton compiles another binary than for others.

    A meta tensor's is where it begins in its storage.
    """
    at = t.storage_offset() * t.element_size() if t.device.type == "meta" else t.data_ptr()
    return at % 16 == 0
