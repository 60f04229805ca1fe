"""Import torchvision beside a torch that its binary was not built for: its models are plain Python."""

from __future__ import annotations

import functools
import importlib
import types

import torch


@functools.cache
def import_torchvision() -> types.ModuleType:
    """torchvision, with the schemas of the compiled ops that its import looks up, where it lacks them.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist: a binary for CUDA beside a CPU build of torch
        import_torchvision.library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            import_torchvision.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision")
