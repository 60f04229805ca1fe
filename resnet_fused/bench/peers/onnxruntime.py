"""ONNX Runtime, on the CPU and in evaluation only: the model exported once for every shape."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from ..exported import Exported, Run, missing

TRAINS, DTYPES = False, ("f32",)


def unavailable(device: torch.device) -> str:
    """It takes packages of its own."""
    return missing(device, "onnx", "onnxscript", "onnxruntime")


def prepare(model: nn.Module) -> nn.Module:
    """The model, to be exported at its first call."""
    return Exported(model, _build)


def _build(model: nn.Module, x: torch.Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would go on spinning while the next contender runs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]
