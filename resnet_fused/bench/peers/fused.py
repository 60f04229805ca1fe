"""This package."""

from __future__ import annotations

import torch
from torch import nn

import resnet_fused

from ..errors import Refused

COUNTED = True


def unavailable(device: torch.device) -> str:
    """Nothing stands against it anywhere: without kernels it runs through plain PyTorch."""
    return ""


def prepare(model: nn.Module, **settings: str) -> nn.Module:
    """The model, fused; raises Refused with the reasons if there is nothing to fuse in it."""
    try:
        return resnet_fused.fuse(model, strict=True, **settings)
    except ValueError as error:
        raise Refused(str(error)) from error
