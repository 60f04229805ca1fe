"""A program in words: the geometry and the settings that decide how long it takes, as the key of what was measured."""

from __future__ import annotations

import torch

from ..backends import tf32
from ..backends.selfcheck.judge import name_of
from ..steps.program import Addition, Averaging, Call, Concatenation, Convolution, Node, Normalisation, Program
from ..steps.spec import Conv, StepTensors


def _conv_text(conv: Conv, own: StepTensors) -> str:
    """ "3x3 64>64 /2": all that decides the time; what is usual is left out."""
    outputs, inputs, *kernel = own.weight.shape
    stride, padding, dilation, groups = conv.args
    text = f"{kernel[0]}x{kernel[1]} {inputs * groups}>{outputs}"
    text += _pair_text(" /", stride, (1, 1)) + _pair_text(" dilation ", dilation, (1, 1))
    text += _pair_text(" padding ", padding, (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2)))
    text += "" if groups == 1 else f" groups {groups}"
    return text if own.bias is None else text + " bias"


def _pair_text(name: str, pair: tuple[int, int], usual: tuple[int, int]) -> str:
    if pair[0] == usual[0] and pair[1] == usual[1]:
        return ""
    return f"{name}{pair[0]}" if pair[0] == pair[1] else f"{name}{pair[0]}x{pair[1]}"


def _node_text(program: Program, value: int, node: Node, own: StepTensors) -> str:
    if isinstance(node, Addition):
        branch = "" if node.branch == value - 1 else f"{node.branch} "
        return f"{branch}+ {_name(program, node.other)}" + (", sampled" if node.sampled else "")
    if isinstance(node, Convolution):
        text = _conv_text(node.conv, own)
    elif isinstance(node, Normalisation):
        text = ("norm" if node.norm.batch_stats else "frozen norm") + (", sampled" if node.sampled else "")
    elif isinstance(node, Concatenation):
        return "concatenation of " + " ".join(_name(program, value) for value in node.reads)
    elif isinstance(node, Averaging):
        kernel, *others = node.average.args
        usual = others == [kernel, (0, 0), False, True, None]
        text = "average " + "x".join(map(str, kernel)) + ("" if usual else f" {others}")
    else:
        text = "pool " + "x".join(map(str, node.pool.kernel))
    return text if node.source in (value - 1, 0) else f"{text} of {node.source}"


def _name(program: Program, value: int) -> str:
    return "x" if value == 0 else "tensor" if value < program.inputs else str(value)


def geometry(call: Call) -> str:
    """The program in words: "1x1 256>64, norm, relu, 1x1 64>256, norm, + x, relu"; other values by number."""
    program, found = call.program, []
    for (value, node), own in zip(program.numbered, call.tensors, strict=True):
        found.append(_node_text(program, value, node, own))
        found += ["relu"] if isinstance(node, Addition | Normalisation) and node.relu else []
        found += [str(node.act)] if isinstance(node, Normalisation) and node.act is not None else []
    return ", ".join(found)


class _Seen:
    threads = torch.get_num_threads()  # a graph may be the first to ask


def threads() -> int:
    """Threads of an operation on the CPU; while a graph is traced, which cannot ask, what was said last."""
    if not torch.compiler.is_compiling():
        _Seen.threads = torch.get_num_threads()
    return _Seen.threads


def settings(call: Call) -> str:
    """What decides the time beside geometry and shape: "float32, auto, 2 threads"."""
    text = f"{name_of(call.x.dtype)}, {call.program.backend}"
    if call.x.device.type == "cpu":
        text += "" if call.program.precision == "default" else f", {call.program.precision}"
        return f"{text}, {threads()} threads"
    return f"{text}, tf32" if call.x.dtype == torch.float32 and tf32.allowed() else text


def key_of(call: Call) -> str:
    """The key of a row, but for the input's shape."""
    return f"{geometry(call)}; {settings(call)}"
