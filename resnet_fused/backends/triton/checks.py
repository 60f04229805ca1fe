"""Argument checks of the Triton ops, worded as `csrc/checks` words them: what came, what is accepted, what to do.

A kernel trusts shapes, dtypes, devices and strides after its check: a wrong one would read out of bounds.
"""

from __future__ import annotations

import torch

from ...ops import lazy
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


def stride(op: str, name: str, steps) -> None:
    """Steps between the pixels that are read."""
    if len(steps) != 2 or min(steps) < 1:
        fail(op, f"{name} is {list(steps)}; pass two positive numbers")


def same(op: str, name: str, t: Tensor | None, data_name: str, like: Tensor, steps=(1, 1)) -> None:
    """An optional second activation tensor, of which the pixels ``[::steps, ::steps]`` are read."""
    if t is None:
        return
    device(op, name, t, like)
    if t.dtype != like.dtype:
        fail(op, f"{name} is {t.dtype} but {data_name} is {like.dtype}; pass one dtype")
    read, at = (t, "") if tuple(steps) == (1, 1) else (lazy.pixels(t, steps), f" at a stride of {list(steps)}")
    if read.shape != like.shape:
        fail(op, f"{name} has shape {list(read.shape)}{at} but {data_name} has {list(like.shape)}; "
                 "pass tensors of one shape")  # fmt: skip
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


def by_sample(op: str, name: str, t: Tensor | None, like: Tensor) -> None:
    """An optional contiguous float32 matrix, with a number for each sample and channel of the activations."""
    if t is None:
        return
    device(op, name, t, like)
    n, c = like.shape[:2]
    if tuple(t.shape) != (n, c):
        fail(op, f"{name} has shape {list(t.shape)} but the activations have {n} samples of {c} channels; "
                 f"pass a [{n}, {c}] matrix")  # fmt: skip
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


def centred(op: str, name: str, t: Tensor | None, mean_name: str, mean: Tensor | None, like: Tensor) -> None:
    """An optional activation tensor and the vector that is subtracted from it in its sum."""
    same(op, name, t, "grad_out", like)
    if (t is None) != (mean is None):
        got, lacks = (name, mean_name) if mean is None else (mean_name, name)
        fail(op, f"got {got} without {lacks}; pass both or neither")
    vector(op, mean_name, mean, like)


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


def lazy_gradient(
    op: str,
    g: Tensor,
    bits: Tensor | None,
    z: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    d: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    sample_factor: Tensor | None,
) -> None:
    """`g` and what makes it a lazy gradient, see `ops.lazy`."""
    data(op, "g", g)
    if bits is not None and bits.dtype != torch.uint8:
        fail(op, f"mask is {bits.dtype}; pass the uint8 mask that norm_add_relu emitted")
    mask(op, bits, g)
    same(op, "z", z, "g", g)
    vector(op, "a", a, g)
    pair(op, "b", b, "d", d, g)
    pair(op, "scale", scale, "shift", shift, g)
    if z is None and (b is not None or (scale is not None and bits is None)):
        fail(op, f"got {'scale' if b is None else 'b'} without z; pass z too")
    vector(op, "sample_factor", sample_factor, g, dim=0)


def statistics(op: str, name: str, t: Tensor, shape: tuple[int, ...], weight: Tensor) -> None:
    """A contiguous float32 matrix or vector of this shape, beside a weight."""
    if t.device != weight.device:
        fail(op, f"{name} is on {t.device} but weight is on {weight.device}; move it there")
    if tuple(t.shape) != shape:
        fail(op, f"{name} has shape {list(t.shape)} but weight has {list(weight.shape)}; pass a {list(shape)} tensor")
    if t.dtype != torch.float32:
        fail(op, f"{name} is {t.dtype}; pass float32 for a {weight.dtype} weight")
    if not t.is_contiguous():
        fail(op, f"{name} is not contiguous; pass {name}.contiguous()")


def gram_arguments(op: str, weight: Tensor, gram: Tensor, total: Tensor, centre: Tensor, a: Tensor) -> None:
    """A 1x1 weight, what the op `gram` made of its input and was given for it, and a tensor of as many pixels."""
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (1, 1):
        fail(op, f"weight has shape {list(weight.shape)}; pass a [K, C, 1, 1] weight")
    data(op, "weight", weight)
    c = weight.shape[1]
    statistics(op, "gram", gram, (c, c), weight)
    statistics(op, "total", total, (c,), weight)
    statistics(op, "centre", centre, (c,), weight)
    if a.dim() != 4:
        fail(op, f"a has shape {list(a.shape)}; pass a [N, C, H, W] tensor of as many pixels as gram was made from")


PARAMETER_DTYPES = (*DATA_DTYPES, torch.float64)


def vectors(op: str, named: dict[str, Tensor | None], dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """Contiguous per-channel vectors without activations beside them; the first decides device and length."""
    (first_name, first), *others = named.items()
    if first.dim() != 1:
        fail(op, f"{first_name} has shape {list(first.shape)}; pass a [C] vector")
    for name, t in ((first_name, first), *others):
        if t is None:
            continue
        if t.device != first.device:
            fail(op, f"{name} is on {t.device} but {first_name} is on {first.device}; move it there")
        if t.shape != first.shape:
            fail(op, f"{name} has shape {list(t.shape)} but {first_name} has {list(first.shape)}; "
                     "pass vectors of one length")  # fmt: skip
        if t.dtype not in dtypes:
            accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            fail(op, f"{name} is {t.dtype}; pass {accepted}")
        if not t.is_contiguous():
            fail(op, f"{name} is not contiguous; pass {name}.contiguous()")


def pixels(op: str, name: str, t: Tensor) -> int:
    """Pixels of an activation tensor that is given for its shape alone."""
    if t.dim() != 4:
        fail(op, f"{name} has shape {list(t.shape)}; pass a [N, C, H, W] tensor")
    return t.shape[0] * t.shape[2] * t.shape[3]


def unsupported(*args, **kwargs) -> list[str]:
    """Reasons against a case, for dispatch: what `layout` refuses, so that another backend may take it."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() == 4]
    dense = all(t.numel() == 0 or t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    return [] if dense else ["takes channels_last tensors only"]
