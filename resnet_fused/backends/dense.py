"""What may stand against the CPU's kernels of dense blocks, which read and write some channels of every pixel."""

from __future__ import annotations

import torch

from ..library import status
from ..ops.contract import is_channels_last, is_slice

Tensor = torch.Tensor


def _reasons(slices: tuple[Tensor, ...], dense: tuple[Tensor, ...], weights_fit: bool, others: tuple) -> list[str]:
    """`dense`: tensors that have to be channels_last; `others`: weights and vectors."""
    if not status().cpu.loaded:
        return [f"the compiled library is {status().cpu.reason}"]
    reasons = []
    if not all(map(is_slice, slices)) or not all(map(is_channels_last, dense)):
        reasons.append("takes channels_last tensors, or channels of such, only")
    if not weights_fit or not all(t.is_contiguous() for t in others if t.dim() == 1):
        reasons.append("takes dense weights and contiguous vectors only")
    if not all(t.dtype == slices[0].dtype for t in (*slices, *dense, *others)):
        reasons.append("takes one dtype only")
    return reasons


def _is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or is_channels_last(weight)


def enter_reasons(x, out) -> list[str]:
    return _reasons((out,), (x,), True, ())


def conv1x1_reasons(x, weight, scale, shift, statistics=True) -> list[str]:
    return _reasons((x,), (), is_channels_last(weight), (weight, scale, shift))


def conv3x3_reasons(z, weight, scale, shift, out, statistics=True) -> list[str]:
    """The weight may be in any layout."""
    return _reasons((out,), (z,), True, (weight, scale, shift))


def conv3x3_backward_reasons(grad, y, b, d, z, weight, scale, shift, mean) -> list[str]:
    return _reasons((grad, y), (z,), _is_dense(weight), (b, d, weight, scale, shift, mean))


def conv1x1_backward_reasons(out, grad, g, z, a, b, d, x, weight, scale, shift, mean) -> list[str]:
    slices = (out, x) if grad is None else (out, grad, x)
    return _reasons(slices, (g, z), is_channels_last(weight), (a, b, d, weight, scale, shift, mean))


def leave_reasons(grad, x, b, d) -> list[str]:
    return _reasons((grad, x), (), True, (b, d))


#: By op.
REASONS = {
    "dense_enter": enter_reasons,
    "dense_conv1x1": conv1x1_reasons,
    "dense_conv3x3": conv3x3_reasons,
    "dense_conv3x3_backward": conv3x3_backward_reasons,
    "dense_conv1x1_backward": conv1x1_backward_reasons,
    "dense_leave": leave_reasons,
}
