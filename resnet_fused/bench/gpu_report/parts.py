"""The parts of a report in the order of their worth, and how they share the time."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """One process. Its module has ``items(context)``, an iterable of (name, function without arguments).

    An item that died is not tried again; the part is, without it.
    """

    name: str
    module: str
    share: float  # of the time; what a part leaves over goes to those after it
    item_seconds: float = 60.0  # an item that takes longer is taken to hang
    checks: bool = False  # whether an item that dies counts as a failed check


def _own(name: str, share: float, item_seconds: float = 60.0, checks: bool = False) -> Part:
    return Part(name, f"{__package__}.{name}", share, item_seconds, checks)


#: Kernels are compiled in parallel before any is needed. Then correctness: a time of a wrong kernel is worth nothing.
#: torch.compile takes minutes, and comes late.
PARTS = (
    _own("environment", 0.03),
    _own("warmup", 0.16, 300.0),
    _own("selfcheck", 0.16, 90.0, checks=True),
    _own("models", 0.20, 150.0),
    _own("bandwidth", 0.14),
    _own("evaluation", 0.07),
    _own("norms", 0.02),
    _own("cuda_graph", 0.05),
    _own("blocks", 0.05, 120.0),
    _own("contract", 0.05, 90.0, checks=True),
    _own("sweep", 0.04),
    _own("compiled", 0.03, 400.0),
)
BY_NAME = {part.name: part for part in PARTS}
