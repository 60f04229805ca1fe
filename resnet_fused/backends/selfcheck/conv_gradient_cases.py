"""Cases of the compiled gradients of 1x1 convolutions for GPUs: tiles, several steps, splits and chunks, ragged ends.

As in :mod:`.conv_cases`; the largest known GPU has 188 multiprocessors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...ops.contract import pack_mask
from .draws import Case, Draw

_MANY = (2, 72, 112, 109)  # more pixels than 190 tiles of 64 have, and no multiple of them
_CHUNKS = (2, 8, 440, 440)  # 32 such tiles for each multiprocessor
_FEW = (3, 72, 9, 7)


def _lazy(draw: Draw, outputs: int) -> tuple[torch.Tensor, dict]:
    """A gradient with all that it may have but bits."""
    n, _, h, w = draw.shape
    vectors = {name: draw.vector(outputs) for name in ("a", "b", "d", "scale", "shift")}
    return draw.data((n, outputs, h, w)), {"z": draw.data((n, outputs, h, w)), "sample_factor": draw.factor()} | vectors


def _masked(draw: Draw, outputs: int) -> tuple[torch.Tensor, dict]:
    """A gradient behind the ReLU of a join."""
    n, _, h, w = draw.shape
    g = draw.data((n, outputs, h, w))
    return g, {"mask": pack_mask(draw.data(g.shape) > 0), "a": draw.vector(outputs)}


def _input(draw: Draw) -> dict:
    return {"x_scale": draw.vector(), "x_shift": draw.vector()}


def _weight(draw: Draw, outputs: int) -> torch.Tensor:
    return draw.data((outputs, draw.shape[1], 1, 1)) / 16


def _through(draw: Draw) -> dict:
    """Through the ReLU and the norm of x, with a correction."""
    half, norm = draw.data((draw.shape[1], draw.shape[1], 1, 1)) / 64, {"x_mean": draw.vector()}
    norm |= {"x_rstd": draw.vector().abs() + 0.0625, "coupling": half + half.transpose(0, 1), "constant": draw.vector()}
    return {"x": draw.data()} | _input(draw) | norm


def dgrad_tiles(dtype: torch.dtype) -> Iterator[Case]:
    """Of the compiled `conv1x1_dgrad`."""
    for name, shape, outputs in (
        ("wide tiles, several steps", _MANY, 136),
        ("small tiles, several to a chunk", _CHUNKS, 8),
        ("small tiles, several steps", _FEW, 136),
        ("odd channels", (3, 65, 9, 7), 33),
    ):
        draw = Draw(shape)
        g, options = _lazy(draw, outputs)
        more = {"weight_grad": True} if shape == _FEW else {}
        yield Case(f"{name}, coefficients", (g, _weight(draw, outputs)), options | _through(draw) | more)
    for name, (n, c, h, w), outputs in (
        ("wide tiles, several across", (2, 136, 112, 109), 24),
        ("small tiles, several steps", _FEW, 136),
        ("odd channels", (3, 65, 9, 7), 33),
    ):
        draw = Draw((n, c, h, w))
        g, options = _masked(draw, outputs)
        residual = draw.data((n, c, (h + 1) // 2, (w + 1) // 2))
        options |= {"residual": residual, "residual_mask": pack_mask(draw.data(residual.shape) > 0)}
        yield Case(f"{name}, residual", (g, _weight(draw, outputs)), options | {"residual_stride": [2, 2]})
    draw = Draw(_FEW)
    g, options = _lazy(draw, _FEW[1])
    yield Case("no weight", (g, None), options | _through(draw))


def wgrad_tiles(dtype: torch.dtype) -> Iterator[Case]:
    """Of the compiled `conv1x1_wgrad`."""
    for name, shape, outputs in (
        ("wide tiles, several across", (2, 136, 40, 41), 136),
        ("high tiles, many splits", (2, 56, 112, 109), 136),
        ("small tiles, many splits", (2, 56, 112, 109), 40),
        ("one split", (3, 136, 3, 5), 200),
        ("odd channels", (3, 65, 19, 17), 33),
    ):
        draw = Draw(shape)
        g, options = _lazy(draw, outputs)
        yield Case(f"{name}, everything lazy", (g, draw.data()), options | _input(draw))
    n, c, h, w = shape = (2, 72, 19, 17)
    draw = Draw(shape)
    g, options = _masked(draw, 136)
    x = draw.data((n, c, 2 * h - 1, 2 * w))
    yield Case("stride 2, rounded", (g, x), options | {"stride": [2, 2], "rounded": True})
