"""Small cases of the ops of a gate for the self-check."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .draws import ODD, TAIL, Case, Draw

Tensor = torch.Tensor


def by_sample(draw: Draw) -> Tensor:
    """A number for each sample and channel: multiples of 1/16 in [-2, 2], others for each sample."""
    n, c = draw.shape[:2]
    return draw.vector(n * c).view(n, c) if n else torch.empty(0, c, dtype=torch.float64)


def gate_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    z = odd.data()
    z[0, 0, 0, 0] = torch.nan
    yield Case("NaN, residual, odd channels", (z, by_sample(odd)), {"residual": odd.data()})
    yield Case("term, no relu", (tail.data(), by_sample(tail)), {"term": by_sample(tail), "relu": False})


def gate_add_relu_backward(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    output = odd.data().clamp_min(0)
    grad_out = torch.where(output <= 0, torch.nan, odd.data())  # a NaN gradient that the mask must drop
    yield Case("output, odd channels", (grad_out, odd.data()), {"out": output})
    yield Case("no relu", (tail.data(), tail.data()), {})
