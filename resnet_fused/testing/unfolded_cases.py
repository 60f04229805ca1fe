"""Cases of the convolution of few pixels: taps that meet none, tails of every register, weights of both layouts."""

from __future__ import annotations

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


CASES = {"conv_norm_add_relu": conv_norm_add_relu}
