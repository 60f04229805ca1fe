"""Cases of the compiled convolutions for GPUs: each of their tiles, several steps of the reduction, ragged ends.

Which tile a call gets depends on how many there would be for each multiprocessor: the largest known GPU has 188.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...ops.conv_chain import Link
from .draws import ODD, Case, Draw

Tensor = torch.Tensor

_MANY = (2, 8, 112, 109)  # more pixels than 190 tiles of 128 have, and no multiple of them
_SUMS = ((0, 1), (2, 2), (3, 2))  # of a chain: what is read, and what is added


def _behind(draw: Draw, outputs: int) -> tuple:
    """Bias, batch norm and eps."""
    vectors = (draw.vector(outputs), draw.vector(outputs), draw.vector(outputs).abs() + 1)
    return *vectors, draw.vector(outputs), draw.vector(outputs), 1e-5


def _case(name: str, shape: tuple, kernel: tuple, stride: int, padding: int, **more) -> Case:
    draw = Draw(shape)
    size = [(n + 2 * padding - kernel[2]) // stride + 1 for n in shape[2:]]
    where = {"stride": [stride] * 2, "padding": [padding] * 2, "relu": True, **more}
    where["residual"] = draw.data((shape[0], kernel[0], *size))
    return Case(name, (draw.data(), draw.data(kernel) / 4, *_behind(draw, kernel[0])), where)


def tiles() -> Iterator[Case]:
    """By what decides the tile: outputs, pixels, whether channels fill 16 bytes."""
    yield _case("largest tiles, two steps", _MANY, (136, 8, 3, 3), 1, 1)
    yield _case("narrow tiles, two steps", _MANY, (56, 8, 3, 3), 1, 1)
    yield _case("small tiles, several steps, stride 2", (3, 72, 9, 7), (136, 72, 3, 3), 2, 1)
    yield _case("7x7 on three channels", (2, 3, 21, 19), (64, 3, 7, 7), 2, 3)
    draw = Draw((2, 40, 9, 7))
    not_finite = draw.data()
    not_finite[0, 3, 4, 4] = torch.nan
    yield Case("NaN, 1x1, nothing behind", (not_finite, draw.data((24, 40, 1, 1)) / 4, *[None] * 5, 1.0), {})


def conv1x1_tiles(dtype: torch.dtype) -> Iterator[Case]:
    """Of the compiled `conv1x1`: its tiles with both ends of the kernel, and chunks of several tiles."""
    for name, shape, outputs, stride in (
        ("largest tiles", _MANY, 136, 1),
        ("narrow tiles, two to a chunk", (2, 8, 440, 440), 16, 1),  # 16 for each multiprocessor
        ("small tiles, several steps, stride 2", (3, 72, 17, 14), 136, 2),
        ("odd channels, tail rows", (3, 65, 9, 7), 33, 1),
    ):
        draw = Draw(shape)
        options = {"x_scale": draw.vector(), "x_shift": draw.vector(), "stride": [stride] * 2}
        weight = draw.data((outputs, shape[1], 1, 1)) / 16
        norm = {"gamma": draw.vector(outputs), "beta": draw.vector(outputs), "eps": 1e-3}
        yield Case(f"{name}, lazy, batch norm", (draw.data(), weight), options | norm)


def conv_values(dtype: torch.dtype) -> Iterator[Case]:
    """Filters of several taps that reach outside the image, as `conv1x1_tiles` has of one."""
    for name, shape, kernel, stride, padding in (
        ("largest tiles, two steps", _MANY, (136, 8, 3, 3), 1, 1),
        ("narrow tiles, two to a chunk", (2, 8, 440, 440), (16, 8, 3, 3), 1, 1),
        ("small tiles, several steps, stride 2", (3, 72, 17, 14), (136, 72, 3, 3), 2, 1),
        ("7x7 on three channels", (2, 3, 21, 19), (64, 3, 7, 7), 2, 3),
        ("odd channels, taps apart", (3, 65, 9, 7), (33, 65, 3, 3), 1, 2),
    ):
        draw = Draw(shape)
        options = {"x_scale": draw.vector(), "x_shift": draw.vector().abs(), "stride": [stride] * 2}
        options |= {"padding": [padding] * 2, "dilation": [2 if "apart" in name else 1] * 2}
        norm = {"gamma": draw.vector(kernel[0]), "beta": draw.vector(kernel[0]), "eps": 1e-3}
        yield Case(f"{name}, lazy, batch norm", (draw.data(), draw.data(kernel) / 16), options | norm)
    draw = Draw((2, 40, 9, 7))
    not_finite = draw.data()
    not_finite[0, 3, 4, 4] = torch.nan
    yield Case("NaN, plain", (not_finite, draw.data((24, 40, 3, 3)) / 16), {"padding": [1, 1]})


def conv_join(dtype: torch.dtype) -> Iterator[Case]:
    """As `tiles`, each with bits, and with samples within a tile and across tiles."""
    for name, shape, kernel, stride, padding in (
        ("largest tiles, two steps", _MANY, (136, 8, 3, 3), 1, 1),
        ("narrow tiles, two steps", _MANY, (56, 8, 3, 3), 1, 1),
        ("small tiles, several steps, stride 2", (3, 72, 9, 7), (136, 72, 3, 3), 2, 1),
        ("odd channels, taps apart", (3, 65, 9, 7), (33, 65, 3, 3), 1, 2),
    ):
        draw = Draw(shape)
        dilation = 2 if "apart" in name else 1
        where = {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2}
        vectors = draw.vector(kernel[0]), draw.vector(kernel[0])
        size = [(n + 2 * padding - dilation * (kernel[2] - 1) - 1) // stride + 1 for n in shape[2:]]
        more = {"residual": draw.data((shape[0], kernel[0], *size)), "sample_factor": draw.factor(), "emit_mask": True}
        yield Case(name, (draw.data(), draw.data(kernel) / 16, *vectors), where | more)
    draw = Draw((2, 40, 9, 7))
    not_finite = draw.data()
    not_finite[0, 3, 4, 4] = torch.nan
    arguments = not_finite, draw.data((24, 40, 3, 3)) / 16, draw.vector(24), draw.vector(24)
    yield Case("NaN, bits, nothing added", arguments, {"padding": [1, 1], "emit_mask": True})
    yield Case("neither ReLU nor bits", (draw.data(), *arguments[1:]), {"padding": [1, 1], "relu": False})


def conv1x1_join_tiles(dtype: torch.dtype) -> Iterator[Case]:
    """Of the compiled `conv1x1_join`: its tiles, of one product and of two."""
    for name, shape, outputs, projects in (
        ("narrow tiles, several across", _MANY, 136, False),
        ("odd channels", (3, 65, 9, 7), 33, False),
        ("many tiles, projection", _MANY, 136, True),
        ("small tiles, several steps", (3, 72, 9, 7), 136, False),
        ("small tiles, several steps, projection", (3, 72, 9, 7), 136, True),
        ("odd channels, projection", (3, 65, 9, 7), 33, True),
    ):
        draw, (n, c, h, w) = Draw(shape), shape
        options = {"x_scale": draw.vector(), "x_shift": draw.vector(), "sample_factor": draw.factor()}
        if projects:
            second = {"x2": draw.data((n, c, 2 * h - 1, 2 * w)), "weight2": draw.data((outputs, c, 1, 1)) / 16}
            options |= second | {"scale2": draw.vector(outputs), "shift2": draw.vector(outputs), "stride2": [2, 2]}
        else:
            vectors = {"residual_scale": draw.vector(outputs), "residual_shift": draw.vector(outputs)}
            options |= {"residual": draw.data((n, outputs, h, w)), **vectors}
        weight = draw.data((outputs, c, 1, 1)) / 16
        yield Case(name, (draw.data(), weight, draw.vector(outputs), draw.vector(outputs)), options)


def chained(x: Tensor, residual: Tensor | None, *convolutions: tuple) -> tuple:
    """Arguments of `conv_chain`. Of each convolution: weight, what is behind it (six, eps last), and its link."""
    tensors = [t for weight, behind, _ in convolutions for t in (weight, *behind[:5])]
    steps = [number for *_, link in convolutions for number in link.integers]
    return x, residual, tensors, steps, [behind[5] for _, behind, _ in convolutions]


def conv_chain(dtype: torch.dtype) -> Iterator[Case]:
    """Bottlenecks with a projection, which is part of a GPU's launch of the sum; values read twice, or not its own."""
    draw, one, three = Draw((2, 40, 9, 7)), ((1, 1), (0, 0), (1, 1)), ((2, 2), (1, 1), (1, 1))
    projected = [
        (draw.data((24, 40, 1, 1)) / 8, _behind(draw, 24), Link(0, -1, True, *one)),
        (draw.data((24, 24, 3, 3)) / 16, _behind(draw, 24), Link(1, -1, True, *three)),
        (draw.data((56, 40, 1, 1)) / 8, _behind(draw, 56), Link(0, -1, False, (2, 2), *one[1:])),
        (draw.data((56, 24, 1, 1)) / 8, _behind(draw, 56), Link(2, 3, True, *one)),
    ]
    yield Case("projected bottleneck", chained(draw.data(), None, *projected), {})
    odd, none = Draw(ODD), (*[None] * 5, 1.0)
    weights = [odd.data((7, 7, 1, 1)) / 8 for _ in range(3)]
    sums = [
        (weight, none, Link(source, added, True, *one)) for weight, (source, added) in zip(weights, _SUMS, strict=True)
    ]
    yield Case("odd channels, values read twice", chained(odd.data(), odd.data(), *sums), {})
    pair = [
        (odd.data((9, 7, 1, 1)) / 8, _behind(odd, 9), Link(0, -1, False, *one)),
        (odd.data((9, 7, 1, 1)) / 8, none, Link(0, 1, False, *one)),
    ]
    yield Case("odd channels, projection", chained(odd.data(), None, *pair), {})
