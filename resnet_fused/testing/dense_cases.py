"""Cases of the ops of dense blocks: every awkward shape, on tensors of their own and on channels of a buffer.

Where a sign is recomputed, what it is of lies on the grid of ``Draw``: masks are then the same in every arithmetic.
Gradients and weights are normal deviates.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.dense_cases import sliced
from ..backends.selfcheck.draws import Case, Draw

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of a dense layer: its images, its inputs, what conv1 makes of them, and the growth."""

    images: tuple[int, int, int]  # samples, height and width
    inputs: int
    middle: int
    growth: int

    def shape(self, channels: int) -> tuple[int, int, int, int]:
        return self.images[0], channels, *self.images[1:]


LAYERS = {
    "DenseNet": Layer((2, 9, 7), 96, 128, 32),
    "odd channels": Layer((2, 5, 3), 65, 13, 3),
    "growth 12": Layer((2, 8, 8), 24, 48, 12),
    "growth 48": Layer((1, 6, 6), 96, 192, 48),
    "growth 1": Layer((2, 4, 5), 3, 4, 1),
    "one value": Layer((1, 1, 1), 1, 1, 1),
    "one pixel a sample": Layer((5, 1, 1), 24, 48, 12),
    "ambiguous strides": Layer((2, 8, 1), 8, 16, 4),
    "several strips": Layer((2, 41, 40), 24, 128, 32),  # of an image
    "several images": Layer((11, 3, 4), 16, 32, 8),  # in a strip
    "many inputs": Layer((1, 4, 5), 200, 48, 12),
    "wide": Layer((1, 3, 300), 16, 64, 16),
    "empty batch": Layer((0, 3, 3), 8, 16, 4),
}


class LayerDraw(Draw):
    """Draws for a dense layer."""

    def __init__(self, layer: Layer):
        super().__init__(layer.shape(layer.inputs))
        self.layer = layer

    def normal(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.contiguous(memory_format=torch.channels_last)

    def weight(self, outputs: int, inputs: int, taps: int) -> Tensor:
        """Keeps the deviation of its input; a mean of 0 in the output would have no relative error to speak of."""
        return self.normal(outputs, inputs, taps, taps) / (inputs * taps * taps) ** 0.5 + 0.1

    def vectors(self, count: int, size: int) -> tuple[Tensor, ...]:
        return tuple(self.vector(size) for _ in range(count))


def _both() -> Iterator[tuple[str, LayerDraw, object]]:
    """Every layer, on tensors of their own and on channels of a buffer."""
    for (name, layer), buffered in itertools.product(LAYERS.items(), (False, True)):
        yield f"{name}, buffered {buffered}", LayerDraw(layer), sliced if buffered else lambda x: x


def specials(x: Tensor) -> Tensor:
    """`x` with NaN, infinities and negative zeros, one kind a channel, in one row; the other channels are clean."""
    for channel, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        x[:, channel, 1] = value
    return x


def dense_enter(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw, place in _both():
        x = draw.normal(*draw.shape) + 1
        yield Case(name, (x, place(draw.data())), {})
    draw = LayerDraw(LAYERS["odd channels"])
    yield Case("large mean", (draw.far_from_zero(dtype), sliced(draw.data())), {})
    yield Case("not finite", (specials(draw.data()), sliced(draw.data())), {})


def dense_leave(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw, place in _both():
        yield Case(name, (place(draw.data()), place(draw.data()), *draw.vectors(2, draw.layer.inputs)), {})
    draw = LayerDraw(LAYERS["odd channels"])
    yield Case("not finite", (specials(draw.data()), sliced(draw.data()), *draw.vectors(2, 65)), {})


def dense_conv1x1(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw, place in _both():
        layer, x = draw.layer, place(draw.normal(*draw.shape))
        args = (x, draw.weight(layer.middle, layer.inputs, 1), *draw.vectors(2, layer.inputs))
        yield Case(name, args, {})
        yield Case(f"{name}, no statistics", args, {"statistics": False})
    draw = LayerDraw(LAYERS["odd channels"])
    args = (draw.weight(13, 65, 1), *draw.vectors(2, 65))
    yield Case("not finite", (sliced(specials(draw.data())), *args), {})


def dense_conv3x3(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw, place in _both():
        layer = draw.layer
        k, g = layer.middle, layer.growth
        z, out = draw.normal(*layer.shape(k)), place(draw.data(layer.shape(g)))
        args = (z, draw.weight(g, k, 3), *draw.vectors(2, k), out)
        yield Case(name, args, {})
        yield Case(f"{name}, no statistics", args, {"statistics": False})
    draw = LayerDraw(LAYERS["odd channels"])
    z, out = draw.data(draw.layer.shape(13)), sliced(draw.data(draw.layer.shape(3)))
    vectors = draw.vectors(2, 13)
    yield Case("contiguous weight", (z, draw.weight(3, 13, 3).contiguous(), *vectors, out), {})
    yield Case("other strides", (z, draw.weight(13, 3, 3).transpose(0, 1), *vectors, out), {})
    yield Case("not finite", (specials(z.clone()), draw.weight(3, 13, 3), *vectors, out), {})


def _gathered(draw: LayerDraw, place) -> tuple:
    growth = draw.layer.growth
    shape = draw.layer.shape(growth)
    return place(draw.normal(*shape)), place(draw.normal(*shape)), *draw.vectors(2, growth)


def dense_conv3x3_backward(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw, place in _both():
        layer = draw.layer
        k, g = layer.middle, layer.growth
        args = (draw.data(layer.shape(k)), draw.weight(g, k, 3), *draw.vectors(3, k))
        yield Case(name, (*_gathered(draw, place), *args), {})
    draw = LayerDraw(LAYERS["odd channels"])
    gathered, vectors = _gathered(draw, sliced), draw.vectors(3, 13)
    z, weight = draw.data(draw.layer.shape(13)), draw.weight(3, 13, 3)
    yield Case("contiguous weight", (*gathered, z, weight.contiguous(), *vectors), {})
    yield Case("input not finite", (*gathered, specials(z.clone()), weight, *vectors), {})
    grad = gathered[0].clone()
    # At a border float32 alone: PyTorch leaves the padding out there, and multiplies it in float64 and 16 bits.
    grad[0, 1, 2, 0 if dtype == torch.float32 else 1] = torch.nan
    yield Case("NaN gradient", (grad, *gathered[1:], z, weight, *vectors), {})


def _backward(draw: LayerDraw, place, own: bool) -> tuple:
    """All arguments; `own`: added to what is there."""
    layer = draw.layer
    k, c = layer.middle, layer.inputs
    shape, wide = draw.shape, layer.shape(k)
    grad = None if own else place(draw.normal(*shape))
    lazy = (draw.normal(*wide), draw.normal(*wide), *draw.vectors(3, k))
    return place(draw.normal(*shape)), grad, *lazy, place(draw.data()), draw.weight(k, c, 1), *draw.vectors(3, c)


def dense_conv1x1_backward(dtype: torch.dtype) -> Iterator[Case]:
    for (name, draw, place), own in itertools.product(_both(), (False, True)):
        yield Case(f"{name}, own {own}", _backward(draw, place, own), {})
    draw = LayerDraw(LAYERS["odd channels"])
    args = list(_backward(draw, sliced, True))
    args[7] = sliced(specials(draw.data()))
    yield Case("input not finite", tuple(args), {})
    args = list(_backward(draw, sliced, False))
    args[2] = args[2].clone()
    args[2][0, 1, 2, 0] = torch.nan
    yield Case("NaN gradient", tuple(args), {})


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
