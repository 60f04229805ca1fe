"""Cases of the stem's pooling. Activations are exact in every dtype, so that a window's winner is the same in each."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case
from ..backends.selfcheck.lazy_cases import PoolDraw

Tensor = torch.Tensor

STEM = (3, 2, 1)  # kernel, stride, padding

#: name -> shape of z, window
LAYERS = {
    "stem": ((2, 65, 13, 10), STEM),
    "3 channels": ((2, 3, 9, 7), STEM),
    "one value": ((1, 1, 1, 1), STEM),
    "one channel": ((3, 1, 4, 5), STEM),
    "one row": ((2, 24, 1, 9), STEM),
    "one column": ((2, 8, 8, 1), STEM),
    "one pixel a sample": ((5, 24, 1, 1), STEM),
    "many rows": ((2, 64, 40, 41), STEM),  # several chunks of work in every backend
    "many channels": ((1, 520, 7, 7), STEM),
    "empty batch": ((0, 8, 5, 5), STEM),
    "2x2": ((2, 20, 9, 7), (2, 2, 0)),  # the last row and column belong to no window
    "nine windows a pixel": ((2, 24, 6, 5), (3, 1, 1)),
    "one pixel a window": ((2, 24, 5, 4), (1, 1, 0)),
    "gaps between windows": ((2, 24, 11, 8), (2, 3, 1)),
    "large padding": ((2, 9, 7, 6), (5, 2, 2)),
    "as wide as uint8 allows": ((1, 8, 17, 18), ((15, 17), (2, 1), (7, 8))),
    "not square": ((2, 17, 7, 9), ((3, 2), (1, 2), (0, 1))),
}


def window(kernel, stride, padding) -> tuple[list[int], ...]:
    """The last three arguments."""
    return tuple([n, n] if isinstance(n, int) else list(n) for n in (kernel, stride, padding))


def _layers() -> Iterator[tuple[str, PoolDraw]]:
    for name, (shape, where) in LAYERS.items():
        yield name, PoolDraw(shape, *window(*where))


def _specials(draw: PoolDraw) -> Tensor:
    """z with NaN of both signs in two places of a window, infinities and negative zeros, one kind a channel."""
    z = draw.data()
    for channel, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0, -torch.nan)):
        z[:, channel, 1:3, ::2] = value
    return z


def norm_relu_pool(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw in _layers():
        yield Case(name, draw.forward(), {})
    draw = PoolDraw((2, 24, 6, 7), *window(*STEM))
    ones, zeros = torch.ones(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    yield Case("not finite", (_specials(draw), ones, zeros), {})
    yield Case("all equal", (torch.full_like(draw.data(), 0.5), ones, zeros), {})
    yield Case("nothing positive", (-draw.data().abs(), ones, zeros), {})


def norm_relu_pool_backward(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw in _layers():
        yield Case(name, draw.backward(), {})
    draw = PoolDraw((2, 24, 6, 7), *window(*STEM))
    yield Case("not finite", draw.backward(_specials(draw)), {})
    yield Case("NaN gradient where masked", draw.backward(nan_where_masked=True), {})
    grad_out, index, z, mean, scale, shift, *where = draw.backward(draw.data() / 16 + 64)
    far = (grad_out, index, z, torch.full_like(mean, 64.0), scale, shift, *where)
    yield Case("mean far from zero", far, {})


def norm_relu_pool_apply(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw in _layers():
        yield Case(name, draw.apply(), {})
    draw = PoolDraw((2, 24, 6, 7), *window(*STEM))
    yield Case("frozen", draw.apply(affine=False), {})
    yield Case("not finite", draw.apply(_specials(draw)), {})
    yield Case("NaN gradient where masked", draw.apply(nan_where_masked=True), {})


CASES = {f.__name__: f for f in (norm_relu_pool, norm_relu_pool_backward, norm_relu_pool_apply)}
