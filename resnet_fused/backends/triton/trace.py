"""What a call of an op would start on a card: its launches, found on meta tensors, where nothing runs.

A :class:`Launch` knows the binary that Triton would run: everything that it specialises on, which is everything but the
sizes. Warming up compiles those, a self-check makes sure that each was compared with the reference.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable

import torch

from ..cards import Card, aligned, assuming

Tensor = torch.Tensor

_notes: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("resnet_fused launches", default=None)


@functools.lru_cache(maxsize=256)
def parameters(kernel) -> tuple[tuple[str, bool], ...]:
    """Name of each parameter of a kernel, and whether it is a compile-time constant; also of an interpreted kernel."""
    found = inspect.signature(kernel.fn).parameters.values()
    return tuple((p.name, "constexpr" in str(p.annotation)) for p in found)


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One start of a kernel."""

    kernel: object
    programs: int
    positional: tuple  # the kernel's first parameters
    named: dict  # its others, by name
    options: dict  # num_warps, num_stages, maxnreg, enable_fp_fusion
    settings: dict  # what `common.start` was given to make them of

    @functools.cached_property
    def values(self) -> dict:
        """Of the kernel's parameters, by name."""
        return dict(zip(self.kernel.arg_names, self.positional, strict=False)) | self.named

    @functools.cached_property
    def binary(self) -> tuple:
        """Everything that decides which binary runs, hashable."""
        parts: list = [self.kernel.fn.__name__, *self.options.items()]
        for name, constant in parameters(self.kernel):
            value = self.values[name]
            if isinstance(value, torch.Tensor):
                parts.append((name, str(value.dtype), aligned(value)))
            elif constant or value is None:
                parts.append((name, value))
        return tuple(parts)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The arguments that Triton does not specialise on."""
        names = (name for name, constant in parameters(self.kernel) if not constant)
        return {name: self.values[name] for name in names if isinstance(self.values[name], int)}


def note(kernel, programs: int, args: tuple, meta: dict, options: dict, settings: dict) -> None:
    """Called for each launch on meta tensors, instead of starting it.

    Raises:
        RuntimeError: nobody traces.
    """
    notes = _notes.get()
    if notes is None:
        raise RuntimeError("resnet_fused's Triton kernels do not run on meta tensors; pass real ones")
    notes.append(Launch(kernel, programs, args, meta, options, settings))


def launches(run: Callable, args: tuple, kwargs: dict, card: Card) -> list[Launch]:
    """What ``run(*args, **kwargs)`` would start on `card`. Tensors may lie anywhere; their values do not matter."""
    return listened(run, tuple(map(on_meta, args)), {name: on_meta(value) for name, value in kwargs.items()}, card)[0]


def listened(run: Callable, args: tuple, kwargs: dict, card: Card) -> tuple[list[Launch], object]:
    """What ``run(*args, **kwargs)`` on meta tensors would start on `card`, and what it returns."""
    token = _notes.set([])
    try:
        with assuming(card), torch.no_grad():
            results = run(*args, **kwargs)
        return _notes.get(), results
    finally:
        _notes.reset(token)


def on_meta(value):
    """A tensor without values, of the same form; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return value
    skip = 0 if aligned(value) else 1
    room = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    flat = torch.empty(max(0, room) + skip, dtype=value.dtype, device="meta")
    return flat.as_strided(value.shape, value.stride(), skip)
