"""torch.compile, once for every batch size. Compiling happens in the unmeasured warm-up and takes minutes."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn


def unavailable(device: torch.device) -> str:
    """On a CPU, Inductor needs a C++ compiler; on a GPU, Triton."""
    compiler = os.environ.get("CXX", "c++")
    if device.type == "cpu" and not any(map(shutil.which, (compiler, "g++", "clang++"))):
        return "torch.compile needs a C++ compiler on a CPU; install g++ or set CXX"
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        return "torch.compile needs Triton on a GPU; pip install triton"
    return ""


def prepare(model: nn.Module) -> nn.Module:
    """The model, to be compiled at its first call."""
    return torch.compile(model, dynamic=False)
