"""What may stand against kernels of dense blocks, which read and write some channels of every pixel."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..library import status
from ..ops.contract import is_channels_last, is_slice

Tensor = torch.Tensor


class Parts(NamedTuple):
    """A call's tensors by what they have to be."""

    slices: tuple[Tensor, ...] = ()
    dense: tuple[Tensor, ...] = ()  # channels_last
    weights: tuple[Tensor, ...] = ()
    vectors: tuple[Tensor, ...] = ()


def _enter(x, out) -> Parts:
    return Parts((out,), (x,))


def _conv1x1(x, weight, scale, shift, statistics=True) -> Parts:
    return Parts((x,), (), (weight,), (scale, shift))


def _conv3x3(z, weight, scale, shift, out, statistics=True) -> Parts:
    return Parts((out,), (z,), (weight,), (scale, shift))


def _conv3x3_backward(grad, y, b, d, z, weight, scale, shift, mean) -> Parts:
    return Parts((grad, y), (z,), (weight,), (b, d, scale, shift, mean))


def _conv1x1_backward(out, grad, g, z, a, b, d, x, weight, scale, shift, mean) -> Parts:
    slices = (out, x) if grad is None else (out, grad, x)
    return Parts(slices, (g, z), (weight,), (a, b, d, scale, shift, mean))


def _leave(grad, x, b, d) -> Parts:
    return Parts((grad, x), (), (), (b, d))


#: By op.
PARTS = {
    "dense_enter": _enter,
    "dense_conv1x1": _conv1x1,
    "dense_conv3x3": _conv3x3,
    "dense_conv3x3_backward": _conv3x3_backward,
    "dense_conv1x1_backward": _conv1x1_backward,
    "dense_leave": _leave,
}


def parts(op: str, *args, **kwargs) -> Parts:
    """The tensors of a call of `op`."""
    return PARTS[op](*args, **kwargs)


def layout_reasons(found: Parts) -> list[str]:
    """What stands against where activations lie."""
    if all(map(is_slice, found.slices)) and all(map(is_channels_last, found.dense)):
        return []
    return ["takes channels_last tensors, or channels of such, only"]


def _weight_fits(op: str, weight: Tensor) -> bool:
    """Whether the CPU's kernel reads this weight; that of `dense_conv3x3` reads every layout."""
    dense = is_channels_last(weight) or (op == "dense_conv3x3_backward" and weight.is_contiguous())
    return dense or op == "dense_conv3x3"


def _cpu_reasons(op: str, *args, **kwargs) -> list[str]:
    if not status().cpu.loaded:
        return [f"the compiled library is {status().cpu.reason}"]
    found = parts(op, *args, **kwargs)
    reasons = layout_reasons(found)
    if not all(_weight_fits(op, t) for t in found.weights) or not all(t.is_contiguous() for t in found.vectors):
        reasons.append("takes dense weights and contiguous vectors only")
    if not all(t.dtype == found.slices[0].dtype for group in found for t in group):
        reasons.append("takes one dtype only")
    return reasons


#: Of the CPU's kernels, by op.
REASONS = {op: functools.partial(_cpu_reasons, op) for op in PARTS}
