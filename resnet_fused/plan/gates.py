"""Whether a gate runs in passes of ours."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .. import library
from ..backends import backends, soundness
from . import choose

Tensor = torch.Tensor
#: Elements from which passes of ours gain on a CPU; below, time is that of calls.
LEAST = 1 << 16
_OPS = ("gate_add_relu", "gate_add_relu_backward")


@torch.compiler.assume_constant_result
def _is_compiled() -> bool:
    return library.status().cpu.loaded


def obstacle(y: Tensor, backend: str) -> str:
    """Why the gate of `y` is stock's; empty if it is not."""
    if backend != "auto":
        return "; ".join(reason for op in _OPS for reason in backends()[backend].reasons(op, (y,), {}))
    place = choose.place_of(y)
    if place is None or place.type != "cpu":
        missing = soundness.lacking(_OPS, y.dtype, place, not isinstance(y, FakeTensor))
        return f"no sound kernel of {missing}" if missing else ""
    if not _is_compiled():
        return "no compiled library"
    return "too small to gain" if y.numel() < LEAST and not choose.fuses_all() else ""
