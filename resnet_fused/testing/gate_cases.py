"""Cases of the ops of a gate: every combination of options on an odd shape, and every awkward shape."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case, Draw
from ..backends.selfcheck.gate_cases import by_sample

Tensor = torch.Tensor

SHAPES = {
    "3 channels": (2, 3, 5, 7),
    "65 channels": (2, 65, 3, 5),
    "one value": (1, 1, 1, 1),
    "one channel": (3, 1, 4, 5),
    "one pixel a sample": (5, 24, 1, 1),
    "ambiguous strides": (2, 8, 8, 1),
    "many rows": (2, 64, 40, 40),  # several chunks of a sample in every backend
    "many channels": (1, 520, 7, 7),
    "many samples": (130, 8, 2, 2),
    "empty batch": (0, 8, 3, 3),
}


def gate_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    for (name, shape), term, residual, relu in itertools.product(SHAPES.items(), *[(False, True)] * 3):
        draw = Draw(shape)
        options = {"term": by_sample(draw)} if term else {}
        options |= {"residual": draw.data()} if residual else {}
        text = f"{name}, term {term}, residual {residual}, relu {relu}"
        yield Case(text, (draw.data(), by_sample(draw)), {**options, "relu": relu})
    draw = Draw((2, 24, 3, 5))
    for relu in (True, False):
        yield Case(f"not finite, relu {relu}", (specials(draw), by_sample(draw)), {"relu": relu})


def specials(draw: Draw) -> Tensor:
    """Activations with NaN, infinities and negative zeros, one kind a channel; the other channels are clean."""
    x = draw.data()
    for channel, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        x[:, channel, 1] = value
    return x


def gate_add_relu_backward(dtype: torch.dtype) -> Iterator[Case]:
    for (name, shape), masked in itertools.product(SHAPES.items(), (False, True)):
        draw = Draw(shape)
        options = {"out": draw.data().clamp_min(0)} if masked else {}
        yield Case(f"{name}, masked {masked}", (draw.data(), draw.data()), options)
    draw = Draw((2, 24, 3, 5))
    output = specials(draw).clamp_min(0)
    yield Case("NaN output", (draw.data(), draw.data()), {"out": output})
    grad_out = torch.where(output <= 0, torch.nan, draw.data())
    yield Case("NaN gradient where masked", (grad_out, draw.data()), {"out": draw.data().clamp_max(0).mul(0)})


CASES = {f.__name__: f for f in (gate_add_relu, gate_add_relu_backward)} | {"gate_add_relu_": gate_add_relu}
