"""Cases of the 3x3 convolution by a kept Winograd weight, and of that weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case
from ..ops import winograd_weight3x3 as weights
from .winograd_cases import SHAPES, NormalDraw, _values

Tensor = torch.Tensor


def winograd_weight3x3(dtype: torch.dtype) -> Iterator[Case]:
    draw = NormalDraw((1, 1, 1, 1))
    for outputs, (k, c) in itertools.product((2, 4), ((1, 1), (33, 3), (64, 70), (40, 16))):
        weight = draw.weight(k, c)
        yield Case(f"{k}x{c}, {outputs} outputs", (weight, None, outputs), {})
        yield Case(f"{k}x{c}, {outputs} outputs, scaled", (weight.contiguous(), draw.data((1, k, 1, 1)).flatten()), {})
    yield Case("40x16, stride 2, scaled", (draw.weight(40, 16), draw.data((1, 40, 1, 1)).flatten()), {"stride": 2})
    exchanged = draw.weight(24, 40).transpose(0, 1)
    yield Case("channels exchanged", (exchanged,), {"outputs": 4})


def _packed(draw: NormalDraw, x: Tensor, outputs: int, scaled: bool) -> tuple:
    """x, weight, transformed weight and scale."""
    weight = draw.weight(outputs, x.shape[1])
    scale = draw.data((1, outputs, 1, 1)).flatten() + 2 if scaled else None
    return x, weight, weights.reference(weight, scale), scale


def winograd_conv3x3_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    for (name, (shape, outputs)), padding in itertools.product(SHAPES.items(), (0, 1)):
        if min(shape[2:]) + 2 * padding < 3:
            continue
        draw, made = NormalDraw(shape), (shape[0], outputs, *(size + 2 * padding - 2 for size in shape[2:]))
        args = _packed(draw, draw.data(), outputs, scaled=True)
        plain = _packed(draw, draw.data(), outputs, scaled=False)[:3]
        shift = draw.data((1, outputs, 1, 1)).flatten()
        more = {"shift": shift, "residual": draw.data(made), "padding": padding, "relu": True}
        yield Case(f"{name}, padding {padding}, all behind it", args, more)
        yield Case(f"{name}, padding {padding}", plain, {"padding": padding})
    draw = NormalDraw((2, 32, 11, 9))
    for padding, size in ((0, (5, 4)), (1, (6, 5))):
        weight, scale, shift = draw.weight(24, 32), *(draw.data((1, 24, 1, 1)).flatten() + 2 for _ in range(2))
        args = draw.data(), weight, weights.reference(weight, scale, stride=2), scale, shift, draw.data((2, 24, *size))
        yield Case(f"stride 2, padding {padding}", args, {"padding": padding, "relu": True, "stride": 2})
    draw = NormalDraw((2, 20, 11, 9))
    for name, values in _values(draw):
        residual = draw.data((2, 24, 11, 9))
        yield Case(name, _packed(draw, values, 24, scaled=False), {"residual": residual})
        yield Case(f"{name}, clamped", _packed(draw, values, 24, scaled=True), {"relu": True})


CASES = {f.__name__: f for f in (winograd_weight3x3, winograd_conv3x3_add_relu)}
