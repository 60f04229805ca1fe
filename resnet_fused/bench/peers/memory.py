"""This package, told to prefer memory: what is kept for backward is told of it too."""

from __future__ import annotations

import torch
from torch import nn

from . import fused

COUNTED = True


def unavailable(device: torch.device) -> str:
    """As the package with its own choice."""
    return fused.unavailable(device)


def prepare(model: nn.Module) -> nn.Module:
    """The model, fused with ``prefer="memory"``."""
    return fused.prepare(model, prefer="memory")
