"""Cases of convolutions by any filter in training: filters, strides and padding; what is before and what is behind.

What lies outside the image is zero, whatever a shift makes of zero: shifts are not, and filters reach outside.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case
from ..ops.conv_add_relu import output_shape
from .conv1x1_cases import Pointwise, specials

#: name -> shape of x, weight, stride, padding, dilation
FILTERS = {
    "3x3": ((2, 24, 7, 6), (40, 24, 3, 3), 1, 1, 1),
    "3x3, stride 2, several steps": ((2, 72, 9, 7), (136, 72, 3, 3), 2, 1, 1),
    "3x3, 65 to 33 channels": ((2, 65, 5, 6), (33, 65, 3, 3), 1, 1, 1),
    "3x3, dilated": ((2, 16, 7, 7), (24, 16, 3, 3), 1, 2, 2),
    "3x3, one pixel": ((5, 8, 1, 1), (8, 8, 3, 3), 1, 1, 1),
    "3x3, one value": ((1, 1, 1, 1), (1, 1, 3, 3), 1, 1, 1),
    "3x3, many rows": ((2, 8, 33, 31), (16, 8, 3, 3), 1, 1, 1),
    "7x7 on 3 channels": ((2, 3, 13, 12), (16, 3, 7, 7), 2, 3, 1),
    "5x5, empty batch": ((0, 8, 5, 5), (8, 8, 5, 5), 1, 2, 1),
    "1x1, stride 2": ((2, 40, 7, 6), (24, 40, 1, 1), 2, 0, 1),
}


class _Values(Pointwise):
    """Draws of which scales are powers of two, so that what is rounded on load is the same in every arithmetic."""

    def arguments(self, kernel: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """An input, and a weight that keeps its deviation; a mean of 0 has no relative error to speak of."""
        weight = self.normal(kernel) / max(1, kernel[1] * kernel[2] ** 2) ** 0.5 + 0.25
        return self.normal(), weight

    def lazy(self) -> dict:
        """Shifts of which the ReLU leaves most: a tap outside that took them would show."""
        vectors = super().lazy()
        return vectors | {"x_shift": vectors["x_shift"].abs() + 0.5}


def conv_values(dtype: torch.dtype) -> Iterator[Case]:
    for name, (shape, kernel, stride, padding, dilation) in FILTERS.items():
        draw = _Values(shape)
        where = {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2}
        norm = {"gamma": draw.vector(kernel[0]), "beta": draw.vector(kernel[0]), "eps": 1e-3}
        yield Case(f"{name}, lazy, batch norm", draw.arguments(kernel), where | draw.lazy() | norm)
        x, weight = draw.arguments(kernel)
        yield Case(f"{name}, statistics", (x, weight.contiguous()), where)
    draw = _Values((2, 24, 6, 5))
    kernel, same = (8, 24, 3, 3), {"padding": [1, 1]}
    yield Case("no statistics", draw.arguments(kernel), same | draw.lazy() | {"emit_stats": False})
    yield Case("batch norm without parameters", draw.arguments(kernel), same | {"eps": 1e-3})
    centre = torch.zeros(kernel, dtype=torch.float64)
    centre[range(8), range(8), 1, 1] = 1.0  # output k is input k
    centre = centre.contiguous(memory_format=torch.channels_last)
    yield Case("large mean", (draw.far_from_zero(dtype), centre), same)
    for lazy in ({}, draw.lazy()):
        yield Case(f"not finite, lazy {bool(lazy)}", (specials(draw.data()), draw.data(kernel) / 16), same | lazy)


def conv_join(dtype: torch.dtype) -> Iterator[Case]:
    """Data of few bits, so that no output's sign depends on the order of a sum."""
    for i, (name, (shape, kernel, *where)) in enumerate(FILTERS.items()):
        draw = _Values(shape)
        places = dict(zip(("stride", "padding", "dilation"), ([n] * 2 for n in where), strict=True))
        arguments = draw.coarse(), draw.data(kernel) / 16, draw.vector(kernel[0]), draw.vector(kernel[0])
        more = {"residual": draw.data(output_shape(shape, kernel, *places.values())), "emit_mask": True}
        yield Case(f"{name}, residual, factor, mask", arguments, places | more | draw.factors())
        contiguous = (arguments[0], arguments[1].contiguous(), *arguments[2:])
        yield Case(f"{name}, mask {i % 2}", contiguous, places | {"relu": i % 3 > 0, "emit_mask": i % 2 == 1})
    draw, kernel, same = _Values((3, 24, 3, 5)), (13, 24, 3, 3), {"padding": [1, 1], "emit_mask": True}
    arguments = draw.coarse(), draw.data(kernel) / 16, draw.vector(13), draw.vector(13)
    for relu in (False, True):
        options = same | draw.factors() | {"residual": specials(draw.data((3, 13, 3, 5))), "relu": relu}
        yield Case(f"residual not finite, relu {relu}", arguments, options)
    yield Case("input not finite, a factor of 0", (specials(draw.coarse()), *arguments[1:]), same | draw.factors())
    shift = torch.where(torch.arange(13) == 3, torch.nan, arguments[3])
    yield Case("NaN shift", (*arguments[:3], shift), same)


CASES = {"conv_values": conv_values, "conv_join": conv_join}
