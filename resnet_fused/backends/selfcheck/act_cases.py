"""Small cases of the ops of a norm with an activation other than ReLU for the self-check: each activation once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...ops import activation
from .draws import ODD, TAIL, Case, Draw


def _draws() -> Iterator[tuple[str, tuple[int, float], Draw]]:
    """Of each activation its name, its code with a slope, and what to draw from: odd and even channels in turn."""
    for code, name in enumerate(activation.NAMES):
        yield name, (code, 0.125), Draw(TAIL if code % 2 else ODD)


def norm_act(dtype: torch.dtype) -> Iterator[Case]:
    for name, act, draw in _draws():
        z = draw.data()
        z[0, 0, 0, 0] = torch.nan
        yield Case(name, (z, draw.vector(), draw.vector(), *act), {})


def norm_act_backward(dtype: torch.dtype) -> Iterator[Case]:
    for name, act, draw in _draws():
        vectors = [draw.vector() for _ in range(3)]
        yield Case(name, (draw.data(), draw.data(), *vectors, *act), {})


def norm_act_apply(dtype: torch.dtype) -> Iterator[Case]:
    for name, act, draw in _draws():
        a, b, d, scale, shift = [draw.vector() for _ in range(5)]
        affine = (b, d) if act[0] != activation.GELU else (None, None)
        yield Case(name, (draw.data(), draw.data(), a, *affine, scale, shift, *act), {})


CASES = {f.__name__: f for f in (norm_act, norm_act_backward, norm_act_apply)} | {"norm_act_apply_": norm_act_apply}
