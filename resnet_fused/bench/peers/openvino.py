"""OpenVINO, on the CPU and in evaluation only: the model converted once for every shape."""

from __future__ import annotations

import torch
from torch import nn

from ..exported import Exported, Run, missing

TRAINS, DTYPES = False, ("f32",)  # on a CPU with bf16 instructions it would take those unasked


def unavailable(device: torch.device) -> str:
    """It takes a package of its own."""
    return missing(device, "openvino")


def prepare(model: nn.Module) -> nn.Module:
    """The model, to be converted at its first call."""
    return Exported(model, _build)


def _build(model: nn.Module, x: torch.Tensor) -> Run:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    converted = openvino.convert_model(model, example_input=x, input=[x.shape])
    request = openvino.compile_model(converted, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
    return lambda images: request(images)[0]
