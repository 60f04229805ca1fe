"""Cases of chains of convolutions: the blocks of the family in evaluation, and orders that none of them has."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..backends.selfcheck.conv_cases import chained
from ..backends.selfcheck.draws import Case
from ..ops.conv_chain import Link
from .cases import NormalDraw

_PLAIN = ((1, 1), (0, 0), (1, 1))  # stride, padding, dilation
_SAME = ((1, 1), (1, 1), (1, 1))
_HALF, _HALF3 = ((2, 2), (0, 0), (1, 1)), ((2, 2), (1, 1), (1, 1))

#: By name: shape of x, that of a residual of its own, and of each convolution its kernel and its link.
_CHAINS = {
    "basic block": (
        (2, 16, 7, 5),
        None,
        ((16, 16, 3, 3), Link(0, -1, True, *_SAME)),
        ((16, 16, 3, 3), Link(1, 0, True, *_SAME)),
    ),
    "projected basic block, odd channels": (
        (2, 9, 7, 6),
        None,
        ((17, 9, 3, 3), Link(0, -1, True, *_HALF3)),
        ((17, 9, 1, 1), Link(0, -1, False, *_HALF)),
        ((17, 17, 3, 3), Link(1, 2, True, *_SAME)),
    ),
    "bottleneck, dilated": (
        (2, 32, 6, 6),
        None,
        ((8, 32, 1, 1), Link(0, -1, True, *_PLAIN)),
        ((8, 8, 3, 3), Link(1, -1, True, (1, 1), (2, 2), (2, 2))),
        ((32, 8, 1, 1), Link(2, 0, True, *_PLAIN)),
    ),
    "projected bottleneck": (
        (3, 16, 9, 7),
        None,
        ((8, 16, 1, 1), Link(0, -1, True, *_PLAIN)),
        ((8, 8, 3, 3), Link(1, -1, True, *_HALF3)),
        ((40, 16, 1, 1), Link(0, -1, False, *_HALF)),
        ((40, 8, 1, 1), Link(2, 3, True, *_PLAIN)),
    ),
    "a residual from outside, values read twice, no last ReLU": (
        (2, 8, 5, 5),
        (2, 8, 5, 5),
        ((8, 8, 3, 3), Link(0, 1, True, *_SAME)),
        ((8, 8, 1, 1), Link(2, 2, True, *_PLAIN)),
        ((8, 8, 1, 1), Link(3, 2, False, *_PLAIN)),
    ),
    "one convolution of one pixel": ((1, 5, 1, 1), None, ((3, 5, 1, 1), Link(0, -1, True, *_PLAIN))),
    "empty batch": (
        (0, 8, 4, 4),
        None,
        ((8, 8, 1, 1), Link(0, -1, True, *_PLAIN)),
        ((8, 8, 1, 1), Link(1, 0, True, *_PLAIN)),
    ),
}


def conv_chain(dtype: torch.dtype) -> Iterator[Case]:
    for name, (shape, added, *convolutions) in _CHAINS.items():
        for normed in (True, False):
            draw = NormalDraw(shape)
            made = []
            for kernel, link in convolutions:
                k, weight = kernel[0], draw.normal(kernel) / (kernel[1] * kernel[2] ** 2) ** 0.5
                if not normed:
                    weight = weight.contiguous()
                norm = (draw.vector(k), draw.vector(k).abs() + 0.5, draw.vector(k), draw.vector(k))
                bias, norm = (None, norm) if normed else (draw.vector(k), [None] * 4)
                made.append((weight, (bias, *norm, 1e-3), link))
            residual = None if added is None else draw.normal(added)
            what = "batch norm" if normed else "bias, contiguous weights"
            yield Case(f"{name}, {what}", chained(draw.normal(), residual, *made), {})


CASES = {"conv_chain": conv_chain}
