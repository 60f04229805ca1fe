"""Cases of the convolution with an unfolded weight: taps that meet no pixel, tails of every register, both layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case
from ..ops.conv_add_relu import output_shape
from .cases import CONVOLUTIONS, NormalDraw

_MORE = {
    "one pixel under a 3x3": ((1, 40, 1, 1), (13, 40, 3, 3), 1, 1, 1, 1),
    "a corner of a 3x3, stride 2": ((1, 33, 2, 2), (6, 33, 3, 3), 2, 1, 1, 1),
    "taps apart": ((1, 16, 3, 3), (5, 16, 3, 3), 1, 3, 3, 1),
    "three pixels, long rows": ((1, 260, 1, 3), (9, 260, 3, 3), 1, 1, 1, 1),
    "1x1 with padding": ((1, 20, 2, 2), (4, 20, 1, 1), 1, 1, 1, 1),
    "many rows on every thread": ((2, 256, 2, 2), (130, 256, 3, 3), 1, 1, 1, 1),
    "1x1 from one channel, one vector": ((2, 1, 7, 6), (16, 1, 1, 1), 1, 0, 1, 1),
    "1x1 from 3 channels, a part of a vector": ((1, 3, 5, 5), (5, 3, 1, 1), 1, 0, 1, 1),
    "1x1, a panel and a part of a vector": ((3, 65, 9, 7), (37, 65, 1, 1), 1, 0, 1, 1),
    "1x1, a panel and more than a vector": ((1, 17, 6, 5), (52, 17, 1, 1), 1, 0, 1, 1),
    "1x1, two parts of the weight, two blocks": ((1, 300, 30, 29), (160, 300, 1, 1), 1, 0, 1, 1),
    "1x1, rows a page apart": ((1, 1024, 4, 4), (33, 1024, 1, 1), 1, 0, 1, 1),
    "1x1, stride 2, lines of more than a tile": ((1, 12, 5, 61), (34, 12, 1, 1), 2, 0, 1, 1),
    "1x1, stride 3, lines of two pixels": ((2, 24, 9, 5), (40, 24, 1, 1), 3, 0, 1, 1),
    "1x1, an empty batch": ((0, 24, 9, 5), (40, 24, 1, 1), 1, 0, 1, 1),
}


def conv_norm_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    layouts = torch.contiguous_format, torch.channels_last
    for name, (shape, kernel, stride, padding, dilation, groups) in (CONVOLUTIONS | _MORE).items():
        if groups > 1:
            continue
        draw, k, where = NormalDraw(shape), kernel[0], ([stride] * 2, [padding] * 2, [dilation] * 2)
        weight = draw.normal(kernel) / max(1, kernel[1] * kernel[2] ** 2) ** 0.5
        for i, layout in enumerate(layouts):
            x, weight = draw.normal(), weight.contiguous(memory_format=layout)
            plain = (x, weight, draw.vector(k) if i else None, None, None, None, None, 1e-5, None, *where)
            yield Case(f"{name}, {layout}, no norm", plain, {})
            weights = (draw.vector(k), draw.vector(k)) if i else (None, None)
            norm = (None if i else draw.vector(k), draw.vector(k), draw.vector(k).abs() + 0.5, *weights, 1e-3)
            residual = draw.normal(output_shape(shape, kernel, *where))
            yield Case(f"{name}, {layout}, all behind it", (x, weight, *norm, residual, *where, True), {})


def conv_norm_add_relu_(dtype: torch.dtype) -> Iterator[Case]:
    for case, adds in itertools.product(conv_norm_add_relu(dtype), (False, True)):
        x, weight, *vectors, residual, stride, padding, dilation = case.args[:12]
        if adds and residual is None:
            continue
        shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
        out = residual if adds else NormalDraw(x.shape).normal(shape)
        read = (x, weight, *vectors, None if adds else residual, stride, padding, dilation, *case.args[12:])
        yield Case(f"{case.name}{', which is there' if adds else ''}", (out, *read), {"adds": adds})


CASES = {"conv_norm_add_relu": conv_norm_add_relu, "conv_norm_add_relu_": conv_norm_add_relu_}
