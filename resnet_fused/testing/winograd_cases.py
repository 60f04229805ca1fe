"""Cases of the 3x3 convolution by minimal filtering: sizes that fill no tile, block or panel, and awkward values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case, Draw

Tensor = torch.Tensor

#: name -> shape of what the convolution reads, its output channels
SHAPES = {
    "one pixel, one channel": ((1, 1, 1, 1), 1),
    "one pixel a sample": ((5, 24, 1, 1), 33),
    "one row": ((2, 16, 1, 9), 16),
    "ambiguous strides": ((2, 8, 8, 1), 8),
    "3 channels, odd sizes": ((2, 3, 5, 7), 40),
    "65 channels": ((2, 65, 3, 6), 65),
    "panels": ((2, 40, 8, 8), 130),
    "blocks": ((3, 24, 41, 30), 20),
    "more outputs than tiles": ((2, 200, 7, 7), 96),
    "empty batch": ((0, 8, 3, 3), 4),
}


class NormalDraw(Draw):
    """As `Draw`, of normal deviates."""

    def data(self, shape=None) -> Tensor:
        values = torch.randn(shape or self.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.contiguous(memory_format=torch.channels_last)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        """One that keeps the size of activations."""
        return self.data((outputs, inputs, 3, 3)) / (9 * inputs) ** 0.5


def _values(draw: NormalDraw) -> Iterator[tuple[str, Tensor]]:
    """Activations as nets have them, and worse."""
    normal = draw.data()
    yield "after a relu", normal.relu()
    yield "mean 100", normal + 100
    empty = normal.relu()
    empty[:, :, 2:9, 1:8] = 0
    yield "sparse", empty * (draw.data() > 1)
    yield "huge and tiny", normal * 10.0 ** draw.data().mul(6).round().clamp(-18, 18)
    for value in (torch.nan, torch.inf, -torch.inf):
        special = normal.clone()
        special[0, 3, 0, 0] = special[1, 7, 4, 5] = special[1, 0, 10, 6] = value
        yield f"with {value}", special


def _shaped() -> Iterator[Case]:
    for (name, (shape, outputs)), padding in itertools.product(SHAPES.items(), (0, 1)):
        draw = NormalDraw(shape)
        if min(shape[2:]) + 2 * padding >= 3:
            where = {"padding": padding, "statistics": True}
            yield Case(f"{name}, padding {padding}", (draw.data(), draw.weight(outputs, shape[1])), where)
        if min(shape[2:]) + 2 - 2 * padding >= 1:
            where = {"padding": padding, "transposed": True}
            yield Case(f"gradient, {name}, padding {padding}", (draw.data(), draw.weight(shape[1], outputs)), where)


def winograd_conv3x3(dtype: torch.dtype) -> Iterator[Case]:
    yield from _shaped()
    draw = NormalDraw((2, 20, 11, 9))
    for name, values in _values(draw):
        for transposed in (False, True):
            weight = draw.weight(*((20, 24) if transposed else (24, 20)))
            options = {"transposed": transposed, "statistics": True}
            yield Case(f"{name}, transposed {transposed}", (values, weight), options)
    weight = draw.weight(24, 20)
    yield Case("contiguous weight", (draw.data(), weight.contiguous()), {})
    yield Case("contiguous weight, gradient", (draw.data(), weight.transpose(0, 1).contiguous(), 0, True), {})
    yield Case("weight with channels exchanged", (draw.data(), draw.weight(20, 24).transpose(0, 1)), {})
    for value in (torch.nan, torch.inf):
        special = weight.clone()
        special[5, 3, 0, 2] = special[9, 0, 1, 1] = value
        yield Case(f"weight with {value}", (draw.data(), special), {"statistics": True})


CASES = {"winograd_conv3x3": winograd_conv3x3}
