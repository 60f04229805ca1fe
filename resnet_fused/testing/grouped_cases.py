"""Cases of grouped 3x3 convolutions: groups that fill a vector, share one or span several, edges, awkward values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case, Draw

Tensor = torch.Tensor

#: name -> channels a group, groups, images, rows, columns
SHAPES = {
    "one pixel, groups of 4": (4, 5, 3, 1, 1),
    "one row, groups of 8": (8, 3, 2, 1, 9),
    "one column, ambiguous strides": (4, 2, 2, 8, 1),
    "two pixels, groups of 2": (2, 9, 1, 2, 2),
    "groups of 4, odd sizes": (4, 32, 2, 7, 15),
    "groups of 8, blocks that overlap": (8, 8, 1, 5, 33),
    "groups of 3": (3, 4, 2, 6, 5),
    "groups of 1": (1, 7, 2, 4, 6),
    "groups of 16": (16, 2, 2, 14, 13),
    "groups of 24": (24, 2, 1, 9, 8),
    "groups of 144": (144, 1, 1, 5, 4),
    "strips and ranges": (4, 40, 2, 40, 41),
    "empty batch": (8, 4, 0, 3, 3),
}


class NormalDraw(Draw):
    """As `Draw`, of normal deviates."""

    def data(self, shape=None) -> Tensor:
        values = torch.randn(shape or self.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.contiguous(memory_format=torch.channels_last)

    def weight(self, channels: int, width: int) -> Tensor:
        """One that keeps the size of activations."""
        return self.data((channels, width, 3, 3)) / (9 * width) ** 0.5


def _drawn() -> Iterator[tuple[str, NormalDraw, Tensor, int, tuple[int, int, int, int]]]:
    """Name, a draw of the input's shape, a weight, a stride and the output's shape."""
    for (name, (width, groups, n, h, w)), stride in itertools.product(SHAPES.items(), (1, 2)):
        channels = width * groups
        draw = NormalDraw((n, channels, h, w))
        made = (n, channels, (h - 1) // stride + 1, (w - 1) // stride + 1)
        yield f"{name}, stride {stride}", draw, draw.weight(channels, width), stride, made


def grouped_conv3x3(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw, weight, stride, made in _drawn():
        yield Case(name, (draw.data(), weight, stride), {"statistics": True})
        more = tuple(size - (less - 1) * stride - 1 for size, less in zip(draw.shape[2:], made[2:], strict=True))
        yield Case(f"gradient, {name}", (draw.data(made), weight, stride, True, False, more), {})
    draw = NormalDraw((2, 24, 11, 9))
    for width in (4, 24):
        weight = draw.weight(24, width)
        for name, x in (("after a relu", draw.data().relu()), ("mean 100", draw.data() + 100)):
            yield Case(f"groups of {width}, {name}", (x, weight), {"statistics": True})
        for value in (torch.nan, torch.inf, -torch.inf):
            x = draw.data()
            x[0, 3, 0, 0] = x[1, 7, 4, 5] = x[1, 0, 10, 6] = value
            yield Case(f"groups of {width}, with {value}", (x, weight), {"statistics": True})
            yield Case(f"groups of {width}, gradient with {value}", (x, weight, 2, True), {})
        yield Case(f"groups of {width}, contiguous weight", (draw.data(), weight.contiguous()), {})
        yield Case(f"groups of {width}, gradient, contiguous weight", (draw.data(), weight.contiguous(), 1, True), {})


def grouped_conv3x3_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw, weight, stride, made in _drawn():
        yield Case(name, (draw.data(made), draw.data(), weight, stride), {})
    draw = NormalDraw((2, 24, 11, 9))
    for width in (4, 24):
        weight = draw.weight(24, width)
        grad, x = draw.data(), draw.data()
        yield Case(f"groups of {width}, both with a mean", (grad + 10, x + 1000, weight), {})
        yield Case(f"groups of {width}, zeros", (grad * 0, x, weight), {})
        yield Case(f"groups of {width}, contiguous weight", (grad, x, weight.contiguous()), {})


CASES = {"grouped_conv3x3": grouped_conv3x3, "grouped_conv3x3_wgrad": grouped_conv3x3_wgrad}
