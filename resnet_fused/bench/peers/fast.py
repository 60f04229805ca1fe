"""This package, allowed the products with the larger rounding error of ``precision="fast"``."""

from __future__ import annotations

import torch
from torch import nn

from . import fused

DTYPES = ("f32",)  # it concerns no other


def unavailable(device: torch.device) -> str:
    """As the package by default, on CPUs."""
    return fused.unavailable(device) if device.type == "cpu" else "it concerns CPUs alone"


def prepare(model: nn.Module) -> nn.Module:
    """The model, fused with ``precision="fast"``."""
    return fused.prepare(model, precision="fast")
