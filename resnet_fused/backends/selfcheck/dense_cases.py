"""Small cases of the ops of dense blocks for the self-check: on channels of a buffer, as they run there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .draws import ODD, TAIL, Case, Draw

Tensor = torch.Tensor


def sliced(x: Tensor, before: int = 3, after: int = 2) -> Tensor:
    """The values of `x` as some channels of a larger tensor."""
    n, c, h, w = x.shape
    buffer = torch.zeros(n, before + c + after, h, w, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    return buffer[:, before : before + c].copy_(x)


def sizes(shape: tuple[int, int, int, int], channels: int) -> tuple[int, int, int, int]:
    """The shape of that many channels on the same pixels."""
    return shape[0], channels, *shape[2:]


def dense_enter(dtype: torch.dtype) -> Iterator[Case]:
    tail = Draw(TAIL)
    yield Case("tail rows", (tail.data(), sliced(tail.data())), {})


def dense_leave(dtype: torch.dtype) -> Iterator[Case]:
    odd = Draw(ODD)
    yield Case("odd channels", (sliced(odd.data()), sliced(odd.data()), odd.vector(), odd.vector()), {})


def dense_conv1x1(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    args = (odd.data(), odd.data((5, 7, 1, 1)) / 4, odd.vector(), odd.vector(), False)
    yield Case("odd channels, no statistics", args, {})
    args = (sliced(tail.data()), tail.data((65, 40, 1, 1)) / 4, tail.vector(), tail.vector())
    yield Case("prefix, tail rows", args, {})


def dense_conv3x3(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    args = (odd.data(), odd.data((3, 7, 3, 3)) / 4, odd.vector(), odd.vector(), odd.data(sizes(ODD, 3)), False)
    yield Case("odd channels, no statistics", args, {})
    out = sliced(tail.data(sizes(TAIL, 12)))
    yield Case("slice", (tail.data(), tail.data((12, 40, 3, 3)) / 4, tail.vector(), tail.vector(), out), {})


def dense_conv3x3_backward(dtype: torch.dtype) -> Iterator[Case]:
    for name, shape, growth in (("odd channels", ODD, 3), ("slice", TAIL, 12)):
        draw, narrow = Draw(shape), sizes(shape, growth)
        gathered = (sliced(draw.data(narrow)), sliced(draw.data(narrow)), draw.vector(growth), draw.vector(growth))
        convolution = (draw.data(), draw.data((growth, shape[1], 3, 3)) / 4)
        yield Case(name, (*gathered, *convolution, draw.vector(), draw.vector(), draw.vector()), {})


def dense_conv1x1_backward(dtype: torch.dtype) -> Iterator[Case]:
    for name, shape, outputs in (("odd channels, added to another", ODD, 5), ("prefix, added to itself", TAIL, 65)):
        draw, wide = Draw(shape), sizes(shape, outputs)
        grad = sliced(draw.data()) if shape is ODD else None
        lazy = (draw.data(wide), draw.data(wide), *(draw.vector(outputs) for _ in "abd"))
        convolution = (sliced(draw.data()), draw.data((outputs, shape[1], 1, 1)) / 4)
        vectors = (draw.vector(), draw.vector(), draw.vector())
        yield Case(name, (sliced(draw.data()), grad, *lazy, *convolution, *vectors), {})


CASES = {
    f.__name__: f
    for f in (
        dense_enter,
        dense_conv1x1,
        dense_conv3x3,
        dense_conv3x3_backward,
        dense_conv1x1_backward,
        dense_leave,
    )
}
