"""This package."""

from __future__ import annotations

import torch
from torch import nn

import resnet_fused


def unavailable(device: torch.device) -> str:
    """Nothing stands against it anywhere: without kernels it runs through plain PyTorch."""
    return ""


def prepare(model: nn.Module) -> nn.Module:
    """The model, fused; raises ValueError with the reasons if there is nothing to fuse in it."""
    return resnet_fused.fuse(model, strict=True)
