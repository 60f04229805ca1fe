"""Where tensors are: on a CPU, or planned for as if they were on a GPU (:func:`...plan.choose.planning_for`)."""

from __future__ import annotations

import torch


class _Planned:
    elsewhere: bool = False  # a plain attribute, which torch.compile can guard on


planned = _Planned()


def on_cpu(x: torch.Tensor) -> bool:
    """Whether what reads `x` runs on a CPU."""
    return x.device.type == "cpu" and not planned.elsewhere
