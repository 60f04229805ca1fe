"""Cases of convolutions of few channels: borders on every side, tails of every vector, strides, what is not finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case
from ..backends.selfcheck.lazy_cases import PoolDraw
from ..ops.conv_add_relu import output_shape
from .cases import NormalDraw
from .pool_cases import STEM, window

Tensor = torch.Tensor

#: name -> shape of x, of the weight, stride, padding
SHAPES = {
    "a stem": ((2, 3, 33, 30), (64, 3, 7, 7), (2, 2), (3, 3)),
    "3x3, stride 2": ((2, 3, 17, 18), (32, 3, 3, 3), (2, 2), (1, 1)),
    "3x3": ((3, 3, 9, 33), (16, 3, 3, 3), (1, 1), (1, 1)),
    "one pixel": ((1, 3, 1, 1), (5, 3, 3, 3), (1, 1), (1, 1)),
    "padding that meets no pixel": ((1, 2, 2, 1), (3, 2, 2, 1), (1, 1), (3, 2)),
    "one channel": ((2, 1, 8, 9), (65, 1, 5, 5), (2, 2), (2, 2)),
    "2 channels, one output": ((2, 2, 7, 6), (1, 2, 3, 3), (1, 2), (0, 1)),
    "4 channels, 1x1": ((2, 4, 6, 5), (24, 4, 1, 1), (3, 3), (0, 0)),
    "no padding, stride 3": ((2, 3, 20, 17), (3, 3, 4, 3), (3, 2), (0, 0)),
    "7 channels": ((2, 7, 9, 8), (33, 7, 3, 3), (1, 1), (1, 1)),
    "many rows": ((2, 3, 60, 61), (48, 3, 3, 3), (1, 1), (1, 1)),
    "a long row": ((1, 3, 3, 600), (17, 3, 3, 3), (1, 1), (0, 0)),
    "empty batch": ((0, 3, 9, 9), (8, 3, 3, 3), (2, 2), (1, 1)),
}


def _draws() -> Iterator[tuple[str, NormalDraw, Tensor, tuple]]:
    for i, (name, (shape, kernel, *where)) in enumerate(SHAPES.items()):
        draw = NormalDraw(shape)
        weight = draw.normal(kernel) / max(1, kernel[1:].count(1) + kernel[1] * kernel[2] * kernel[3]) ** 0.5
        yield name, draw, weight if i % 2 else weight.contiguous(), tuple(map(list, where))


def _specials(draw: NormalDraw) -> Tensor:
    """x with NaN and infinities of both signs at corners and within."""
    x = draw.normal()
    for row, column, value in ((0, 0, torch.nan), (-1, -1, torch.inf), (3, 4, -torch.inf), (5, 0, torch.nan)):
        x[0, :, row, column] = value
    return x


def _not_finite(kernel: tuple[int, ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What meets no border where it is not finite must not reach results there: those are where zeros are added."""
    draw = NormalDraw((2, 3, 11, 12))
    weight = draw.normal(kernel) / 4
    yield "not finite", _specials(draw), weight
    for tap, value in (((0, 0), torch.inf), ((-1, 1), -torch.inf), ((1, -1), torch.nan)):
        odd = weight.clone()
        odd[1, 0, tap[0], tap[1]] = value
        yield f"{value} in a corner of the weight", draw.normal(), odd


def stem_conv(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw, weight, where in _draws():
        for statistics in (False, True):
            yield Case(f"{name}, statistics {statistics}", (draw.normal(), weight, *where, statistics), {})
    for name, x, weight in _not_finite((20, 3, 3, 3)):
        yield Case(name, (x, weight, [2, 2], [1, 1]), {})
    draw = NormalDraw((2, 3, 33, 30))
    far = draw.normal((32, 3, 7, 7)) / 12 + 1, [2, 2], [0, 0], True
    yield Case("a mean far from zero", (draw.normal() / 16 + 64, *far), {})


def stem_conv_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw, weight, where in _draws():
        shape = output_shape(draw.shape, weight.shape, *where, (1, 1))
        yield Case(name, (draw.normal(shape), draw.normal(), weight, *where), {})
    draw = NormalDraw((2, 3, 11, 12))
    grad, weight = draw.normal((2, 20, 6, 6)), draw.normal((20, 3, 3, 3))
    yield Case("x not finite", (grad, _specials(draw), weight, [2, 2], [1, 1]), {})
    grad[0, 1, 0, 0], grad[1, 2, -1, 3] = torch.inf, torch.nan
    yield Case("gradient not finite", (grad, draw.normal(), weight, [2, 2], [1, 1]), {})


def conv_norm_relu_pool(dtype: torch.dtype) -> Iterator[Case]:
    for i, (name, draw, weight, where) in enumerate(_draws()):
        k, size = weight.shape[0], output_shape(draw.shape, weight.shape, *where, (1, 1))[2:]
        norm = (
            draw.vector(k),
            draw.vector(k).abs() + 0.5,
            *((draw.vector(k), draw.vector(k)) if i % 3 else (None, None)),
        )
        pool = window(*STEM) if min(size) > 2 else ([1, 1], [1, 1], [0, 0])
        bias = draw.vector(k) if i % 2 else None
        yield Case(f"{name}, norm", (draw.normal(), weight, bias, *norm, 1e-3, *where, *pool), {})
        plain = (draw.normal(), weight, bias, *[None] * 4, 1.0, *where, *pool)
        yield Case(f"{name}, no norm", plain, {})
    draw = NormalDraw((2, 3, 19, 23))
    weight, norm = (
        draw.normal((20, 3, 3, 3)) / 4,
        (None, draw.vector(20), draw.vector(20).abs() + 0.5, None, None, 1e-5),
    )
    for pool in ((2, 2, 0), (3, 1, 1), (1, 1, 0), (2, 3, 1), (5, 2, 2), ((3, 2), (1, 2), (0, 1))):
        yield Case(f"pool {pool}", (draw.normal(), weight, *norm, [1, 2], [1, 1], *window(*pool)), {})
    for name, x, odd in _not_finite((20, 3, 3, 3)):
        yield Case(name, (x, odd, *norm, [2, 2], [1, 1], *window(*STEM)), {})
    nan = draw.vector(20)
    nan[3] = torch.nan
    yield Case("NaN in a mean", (draw.normal(), weight, None, nan, norm[2], None, None, 1e-5, [1, 1], [1, 1]), {})


def stem_pool_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    for i, (name, draw, weight, where) in enumerate(_draws()):
        shape = output_shape(draw.shape, weight.shape, *where, (1, 1))
        pool = window(*STEM) if min(shape[2:]) > 2 else ([1, 1], [1, 1], [0, 0])
        arguments = PoolDraw(shape, *pool).apply(affine=i % 2 == 0)[:8]
        yield Case(name, (*arguments, draw.normal(), weight, *where, *pool), {})
    draw, pooled = NormalDraw((2, 3, 11, 12)), PoolDraw((2, 20, 6, 6))
    same = draw.normal((20, 3, 3, 3)), [2, 2], [1, 1]
    yield Case("x not finite", (*pooled.apply()[:8], _specials(draw), *same), {})
    grad_out, *rest = pooled.apply()[:8]
    grad_out[0, 1, 0, 0], grad_out[1, 2, -1, 1] = torch.inf, torch.nan
    yield Case("gradient not finite", (grad_out, *rest, draw.normal(), *same), {})


CASES = {f.__name__: f for f in (stem_conv, stem_conv_wgrad, stem_pool_wgrad, conv_norm_relu_pool)}
