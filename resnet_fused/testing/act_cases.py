"""Cases of the ops of a norm with an activation other than ReLU: every activation on every awkward shape."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case, Draw
from ..ops import activation
from .gate_cases import SHAPES, specials

SLOPE = 0.0625


def _all() -> Iterator[tuple[str, tuple[int, float], Draw]]:
    for (code, act), (name, shape) in itertools.product(enumerate(activation.NAMES), SHAPES.items()):
        yield f"{act}, {name}", (code, SLOPE), Draw(shape)


def _not_finite() -> Iterator[tuple[str, tuple[int, float], Draw]]:
    for code, act in enumerate(activation.NAMES):
        yield f"{act}, not finite", (code, SLOPE), Draw((2, 24, 3, 5))


def _identity(draw: Draw) -> list[torch.Tensor]:
    return [torch.ones(draw.shape[1], dtype=torch.float64), torch.zeros(draw.shape[1], dtype=torch.float64)]


def norm_act(dtype: torch.dtype) -> Iterator[Case]:
    for name, act, draw in _all():
        yield Case(name, (draw.data(), draw.vector(), draw.vector(), *act), {})
    for name, act, draw in _not_finite():
        yield Case(name, (specials(draw), *_identity(draw), *act), {})
    for code, act in enumerate(activation.NAMES):  # where exponentials overflow, or vanish, and on a fine grid
        draw = Draw((1, 8, 40, 40))
        steep = [torch.tensor([1.0, 8, 24, 25.5, 0.25, 1, -3, 100]).double(), torch.zeros(8).double()]
        yield Case(f"{act}, steep", (draw.data(), *steep, code, SLOPE), {})


def norm_act_backward(dtype: torch.dtype) -> Iterator[Case]:
    for name, act, draw in _all():
        vectors = [draw.vector() for _ in range(3)]
        yield Case(name, (draw.data(), draw.data(), *vectors, *act), {})
    for name, act, draw in _not_finite():
        yield Case(name, (draw.data(), specials(draw), draw.vector(), *_identity(draw), *act), {})
    for code, act in enumerate(activation.NAMES):
        far = Draw((2, 24, 20, 20))
        mean = torch.full((24,), 64.0).double()
        args = (far.data(), far.far_from_zero(dtype), mean, torch.ones(24).double(), -mean, code, SLOPE)
        yield Case(f"{act}, mean far from zero", args, {})


def norm_act_apply(dtype: torch.dtype) -> Iterator[Case]:
    for (name, act, draw), affine in itertools.product(_all(), (False, True)):
        a, b, d, scale, shift = [draw.vector() for _ in range(5)]
        vectors = (a, b, d) if affine else (a, None, None)
        yield Case(f"{name}, affine {affine}", (draw.data(), draw.data(), *vectors, scale, shift, *act), {})
    for name, act, draw in _not_finite():
        args = (draw.data(), specials(draw), draw.vector(), None, None, *_identity(draw), *act)
        yield Case(name, args, {})


CASES = {f.__name__: f for f in (norm_act, norm_act_backward, norm_act_apply)} | {"norm_act_apply_": norm_act_apply}
