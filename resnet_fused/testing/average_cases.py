"""Cases of the ops that average over windows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..backends.selfcheck.average_cases import AverageDraw
from ..backends.selfcheck.draws import Case

Tensor = torch.Tensor

#: name -> shape of x, kernel, stride
LAYERS = {
    "transition": ((2, 65, 12, 10), (2, 2), (2, 2)),
    "last row and column in no window": ((2, 20, 9, 7), (2, 2), (2, 2)),
    "3 channels": ((2, 3, 8, 6), (2, 2), (2, 2)),
    "one value": ((1, 1, 1, 1), (1, 1), (1, 1)),
    "one channel": ((3, 1, 4, 5), (2, 2), (2, 2)),
    "one row": ((2, 24, 1, 9), (1, 2), (1, 2)),
    "one column": ((2, 8, 8, 1), (2, 1), (2, 1)),
    "one window a sample": ((5, 24, 3, 3), (3, 3), (3, 3)),
    "many rows": ((2, 64, 40, 41), (2, 2), (2, 2)),  # several chunks of work in every backend
    "many channels": ((1, 520, 6, 6), (2, 2), (2, 2)),
    "empty batch": ((0, 8, 4, 4), (2, 2), (2, 2)),
    "nine windows a pixel": ((2, 24, 6, 5), (3, 3), (1, 1)),
    "windows that overlap in part": ((2, 24, 9, 8), (3, 3), (2, 2)),
    "gaps between windows": ((2, 24, 11, 8), (2, 2), (3, 3)),
    "not square": ((2, 17, 7, 9), (3, 2), (1, 2)),
    "many places": ((1, 8, 9, 8), (7, 5), (2, 3)),
}


def _layers() -> Iterator[tuple[str, AverageDraw]]:
    for name, layer in LAYERS.items():
        yield name, AverageDraw(*layer)


def _specials(draw: AverageDraw) -> Tensor:
    """x with NaN, infinities and negative zeros, one kind a channel; the other channels are clean."""
    x = draw.data()
    for channel, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        x[:, channel, 1:3, ::2] = value
    return x


def norm_relu_avg_pool(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw in _layers():
        yield Case(name, draw.forward(), {})
    draw = AverageDraw((2, 24, 6, 7))
    yield Case("not finite", (_specials(draw), *draw.forward()[1:]), {})
    yield Case("nothing positive", (-draw.data().abs(), draw.vector().abs(), draw.vector() * 0), {})


def norm_relu_avg_pool_backward(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw in _layers():
        yield Case(name, draw.backward(), {})
    draw = AverageDraw((2, 24, 6, 7))
    yield Case("NaN gradient where masked", draw.backward(nan_where_masked=True), {})
    grad_out, x, mean, *rest = draw.backward()
    yield Case("mean far from zero", (grad_out, x / 16 + 64, torch.full_like(mean, 64.0), *rest), {})
    yield Case("not finite", (grad_out, _specials(draw), mean, *rest), {})


def norm_relu_avg_pool_apply(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw in _layers():
        yield Case(name, draw.apply(), {})
    draw = AverageDraw((2, 24, 6, 7))
    yield Case("frozen", draw.apply(affine=False), {})
    yield Case("NaN gradient where masked", draw.apply(nan_where_masked=True), {})
    grad_out, _, *rest = draw.apply()
    yield Case("not finite", (grad_out, _specials(draw), *rest), {})


CASES = {f.__name__: f for f in (norm_relu_avg_pool, norm_relu_avg_pool_backward, norm_relu_avg_pool_apply)}
