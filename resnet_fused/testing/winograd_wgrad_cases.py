"""Cases of the weight gradient by Winograd's products: awkward sizes and values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case, Draw

#: name -> shape of x, channels of grad
SHAPES = {
    "one pixel, one channel": ((1, 1, 1, 1), 1),
    "one pixel a sample": ((70, 24, 1, 1), 33),
    "one row": ((2, 16, 1, 9), 16),
    "ambiguous strides": ((2, 8, 8, 1), 8),
    "3 channels, odd sizes": ((2, 3, 5, 7), 40),
    "65 channels": ((2, 65, 3, 6), 65),
    "whole panels": ((2, 64, 8, 8), 32),
    "units of channels": ((2, 130, 9, 8), 260),
    "parts": ((3, 20, 41, 30), 9),
    "parts and units": ((2, 130, 34, 31), 40),
    "empty batch": ((0, 8, 3, 3), 4),
}


class NormalDraw(Draw):
    """As `Draw`, of normal deviates."""

    def data(self, shape=None) -> torch.Tensor:
        values = torch.randn(shape or self.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.contiguous(memory_format=torch.channels_last)


def _of_shapes() -> Iterator[Case]:
    for (name, (shape, outputs)), padding in itertools.product(SHAPES.items(), ((1, 1), (0, 0), (2, 1))):
        draw, (n, c, h, w) = NormalDraw(shape), shape
        size = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
        if min(size) > 0:
            args = (draw.data((n, outputs, *size)), draw.data(), draw.data((outputs, c, 3, 3)), padding)
            yield Case(f"{name}, padding {padding}", args, {})


def _of_values() -> Iterator[Case]:
    draw = NormalDraw((4, 20, 31, 29))
    weight, grad, x = draw.data((24, 20, 3, 3)), draw.data((4, 24, 31, 29)), draw.data()
    yield Case("after a relu, sparse gradient", (grad * (draw.data(grad.shape) > 0.5), x.relu(), weight), {})
    yield Case("mean 100", (grad, x + 100, weight), {})
    yield Case("both with a mean", (grad + 10, x + 1000, weight), {})
    channels = 10.0 ** draw.data((1, 20, 1, 1)).mul(5).round().clamp(-12, 12)
    yield Case("huge and tiny channels", (grad, x * channels, weight), {})
    yield Case("huge and tiny pixels", (grad, x * 10.0 ** draw.data().mul(3).round().clamp(-9, 9), weight), {})
    yield Case("zeros", (grad * 0, x, weight), {})
    for name, w in (("contiguous", weight.contiguous()), ("transposed", draw.data((20, 24, 3, 3)).transpose(0, 1))):
        yield Case(f"{name} weight", (grad, x, w), {})


def winograd_conv3x3_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    yield from _of_shapes()
    yield from _of_values()


CASES = {"winograd_conv3x3_wgrad": winograd_conv3x3_wgrad}
