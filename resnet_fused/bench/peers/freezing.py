"""torch.compile with constant folding of the weights, which is for evaluation only."""

from __future__ import annotations

import torch
from torch import nn

from . import compile as compiled

TRAINS = False


def unavailable(device: torch.device) -> str:
    """As torch.compile."""
    return compiled.unavailable(device)


def prepare(model: nn.Module) -> nn.Module:
    """The model, to be compiled at its first call."""
    return torch.compile(model.eval(), dynamic=False, options={"freezing": True})
