"""Argument checks of the Triton ops, worded as `csrc/check.h` words them: what came, what is accepted, what to do.

A kernel trusts shapes, dtypes, devices and strides after its check: a wrong one would read out of bounds.
"""

from __future__ import annotations

import torch

from ...ops.contract import DATA_DTYPES, Tensor, mask_shape


def fail(op: str, text: str) -> None:
    raise RuntimeError(f"{op}: {text}")


def layout(op: str, name: str, t: Tensor) -> None:
    if t.numel() and not t.is_contiguous(memory_format=torch.channels_last):
        fail(op, f"{name} of shape {list(t.shape)} is not channels_last; "
                 f"pass {name}.contiguous(memory_format=torch.channels_last)")  # fmt: skip


def data(op: str, name: str, t: Tensor) -> None:
    """The tensor that decides dtype, device and shape of all others."""
    if t.dim() != 4:
        fail(op, f"{name} has shape {list(t.shape)}; pass a [N, C, H, W] tensor")
    if t.dtype not in DATA_DTYPES:
        fail(op, f"{name} is {t.dtype}; pass float32, bfloat16 or float16")
    layout(op, name, t)


def device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        fail(op, f"{name} is on {t.device} but the activations are on {like.device}; move it there")


def same(op: str, name: str, t: Tensor | None, data_name: str, like: Tensor) -> None:
    """An optional second activation tensor."""
    if t is None:
        return
    device(op, name, t, like)
    if t.dtype != like.dtype:
        fail(op, f"{name} is {t.dtype} but {data_name} is {like.dtype}; pass one dtype")
    if t.shape != like.shape:
        fail(op, f"{name} has shape {list(t.shape)} but {data_name} has {list(like.shape)}; pass tensors of one shape")
    layout(op, name, t)


def vector(op: str, name: str, t: Tensor | None, like: Tensor, dim: int = 1) -> None:
    """An optional contiguous float32 vector along dimension `dim` of the activations: [C] for 1, [N] for 0."""
    if t is None:
        return
    device(op, name, t, like)
    size = like.shape[dim]
    if t.dim() != 1 or t.shape[0] != size:
        kind = "channels" if dim == 1 else "samples"
        fail(op, f"{name} has shape {list(t.shape)} but the activations have {size} {kind}; pass a [{size}] vector")
    if t.dtype != torch.float32:
        fail(op, f"{name} is {t.dtype}; pass float32 for {like.dtype} activations")
    if not t.is_contiguous():
        fail(op, f"{name} is not contiguous; pass {name}.contiguous()")


def pair(op: str, name: str, t: Tensor | None, other_name: str, other: Tensor | None, like: Tensor) -> None:
    """Two vectors that make sense only together."""
    if (t is None) != (other is None):
        got, lacks = (name, other_name) if other is None else (other_name, name)
        fail(op, f"got {got} without {lacks}; pass both or neither")
    vector(op, name, t, like)
    vector(op, other_name, other, like)


def mask(op: str, t: Tensor | None, like: Tensor) -> None:
    """The forward's packed bits, or its output."""
    if t is None:
        return
    if t.dtype != torch.uint8:
        return same(op, "mask", t, "grad_out", like)
    device(op, "mask", t, like)
    if tuple(t.shape) != mask_shape(like) or not t.is_contiguous():
        fail(op, f"mask has shape {list(t.shape)}; pass the contiguous {list(mask_shape(like))} mask that "
                 f"norm_add_relu emitted for activations of shape {list(like.shape)}")  # fmt: skip


def unsupported(*args, **kwargs) -> list[str]:
    """Reasons against a case, for dispatch: what `layout` refuses, so that another backend may take it."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() == 4]
    dense = all(t.numel() == 0 or t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    return [] if dense else ["takes channels_last tensors only"]
