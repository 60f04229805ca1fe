"""Stock PyTorch, operation by operation: what everything else is held against."""

from __future__ import annotations

import torch
from torch import nn


def unavailable(device: torch.device) -> str:
    """Nothing stands against it anywhere."""
    return ""


def prepare(model: nn.Module) -> nn.Module:
    """The model as it is."""
    return model
