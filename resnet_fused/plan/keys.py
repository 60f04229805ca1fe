"""A chain in words: the geometry and the settings that decide how long it takes, as the key of what was measured."""

from __future__ import annotations

import torch

from ..backends import tf32
from ..backends.selfcheck.judge import name_of
from ..steps import Chain, Step, StepTensors

Tensor = torch.Tensor


def _step_text(step: Step, own: StepTensors) -> str:
    """ "3x3 64>64 /2": all that decides the step's time; what is usual is left out."""
    outputs, inputs, *kernel = own.weight.shape
    stride, padding, dilation, groups = step.conv.args
    text = f"{kernel[0]}x{kernel[1]} {inputs * groups}>{outputs}"
    text += _pair_text(" /", stride, (1, 1)) + _pair_text(" dilation ", dilation, (1, 1))
    text += _pair_text(" padding ", padding, (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2)))
    text += "" if groups == 1 else f" groups {groups}"
    text += "" if own.bias is None else " bias"
    return text if step.norm.batch_stats else text + " frozen"


def _pair_text(name: str, pair: tuple[int, int], usual: tuple[int, int]) -> str:
    if pair[0] == usual[0] and pair[1] == usual[1]:
        return ""
    return f"{name}{pair[0]}" if pair[0] == pair[1] else f"{name}{pair[0]}x{pair[1]}"


def residual_kind(x: Tensor, residual: Tensor | None) -> str:
    """Where the residual of a chain without a projection comes from: "", "x" (its input), or "tensor"."""
    return "" if residual is None else "x" if residual is x else "tensor"


def geometry(chain: Chain, tensors: list[StepTensors], residual: str, sampled: bool) -> str:
    """The chain in words: "1x1 256>64, 3x3 64>64, 1x1 64>256 + x, relu"."""
    last = len(chain.steps)
    text = ", ".join([_step_text(step, own) for step, own in zip(chain.steps, tensors[:last], strict=True)])
    text += f" + {_step_text(chain.shortcut, tensors[-1])}" if chain.shortcut is not None else ""
    text += f" + {residual}" if residual else ""
    text += ", per-sample factor" if sampled else ""
    return text + (", relu" if chain.relu else "")


class _Seen:
    threads = 0


def threads() -> int:
    """Threads of an operation on the CPU; while a graph is traced, which cannot ask, what was said last."""
    if not torch.compiler.is_compiling():
        _Seen.threads = torch.get_num_threads()
    return _Seen.threads


def environment(x: Tensor) -> int | bool:
    """What of PyTorch's settings decides the time: threads on the CPU, on GPUs whether float32 products are TF32."""
    if x.device.type == "cpu":
        return threads()
    return x.dtype == torch.float32 and tf32.allowed()


def settings(chain: Chain, x: Tensor) -> str:
    """What decides the time beside geometry and shape: "float32, auto, 2 threads"."""
    text, found = f"{name_of(x.dtype)}, {chain.backend}", environment(x)
    if x.device.type == "cpu":
        return f"{text}, {found} threads"
    return f"{text}, tf32" if found else text


def key_of(chain: Chain, x: Tensor, tensors: list[StepTensors], residual: str, sampled: bool) -> str:
    """The key of a row, but for the input's shape."""
    return f"{geometry(chain, tensors, residual, sampled)}; {settings(chain, x)}"
