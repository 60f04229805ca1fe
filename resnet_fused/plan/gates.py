"""Whether a gate runs in passes of ours, and whether it keeps what it reads."""

from __future__ import annotations

from torch import Tensor

from ..backends import backends
from ..steps import remade
from ..steps.kinds import Kind
from ..steps.program import Program
from . import choose, cpu_values

#: Elements from which passes of ours gain on a CPU; below, time is that of calls.
LEAST = 1 << 16
_OPS = ("gate_add_relu", "gate_add_relu_backward")


def obstacle(y: Tensor, backend: str) -> str:
    """Why the gate of `y` is stock's; empty if it is not."""
    if backend != "auto":
        return "; ".join(reason for op in _OPS for reason in backends()[backend].reasons(op, (y,), {}))
    place = choose.place_of(y)
    if place is None or place.type != "cpu":
        missing = choose.lacking(_OPS, y)
        return f"no sound kernel of {missing}" if missing else ""
    if not cpu_values.level():
        return "no compiled library"
    return "too small to gain" if y.numel() < LEAST and not choose.fuses_all() else ""


def remakes(program: Program, last: Kind) -> bool:
    """Whether a gate that alone reads the output of `program` makes that again in backward. `last`: its last step."""
    return program.prefer == "memory" and remade.can_be(program, last)
