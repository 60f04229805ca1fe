"""The calls of our ops that a fused model makes, each distinct one once, and random tensors to make them with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...ops import winograd_weight3x3
from ...plan import devices
from ...traffic.calls import Call, Spec, calls
from .. import named
from .context import Context

Tensor = torch.Tensor


def calls_of(context: Context, name: str, training: bool) -> dict[Call, int]:
    """The distinct calls of a fused model's step, or of its evaluation, with how often each is made."""
    settings = context.settings
    x = torch.empty(settings.batch, 3, settings.size, settings.size, dtype=settings.dtype, device="meta")
    return calls(named.build(name), x, training, devices.of(context.device))


def drawn(call: Call, generator: torch.Generator) -> tuple:
    """Arguments for a real call on the device of `generator`, drawn anew; all of them by position."""
    window = math.prod(dict(call.arguments).get("kernel") or (3, 3))
    given = {n: draw(v, generator, window) if isinstance(v, Spec) else v for n, v in call.arguments}
    if "gram" in given:
        consistent_gram(given, generator)
    if "packed" in given:  # what a weight was transformed to
        outputs = math.isqrt(given["packed"].shape[1]) - 2
        given["packed"] = winograd_weight3x3.reference(given["weight"], given.get("scale"), outputs)
    return tuple(given.values())


def draw(spec: Spec, generator: torch.Generator, window: int) -> Tensor:
    """Random numbers on a grid on which signs are the same in every arithmetic, as the self-check's cases have them."""
    device = generator.device

    def grid(steps: int, step: float) -> Tensor:
        drawn = torch.randint(-steps, steps + 1, spec.shape, generator=generator, device=device, dtype=torch.int8)
        return drawn.to(spec.dtype).mul_(step)

    if spec.dtype == torch.int64:  # a counter
        drawn = torch.randint(0, 100, spec.shape, generator=generator, device=device)
    elif spec.dtype == torch.uint8:
        top = window if spec.name == "index" else 256
        drawn = torch.randint(0, top, spec.shape, generator=generator, device=device, dtype=torch.uint8)
    elif spec.name == "sample_factor":
        drawn = 2 * torch.randint(0, 2, spec.shape, generator=generator, device=device).to(spec.dtype)
    elif spec.name in ("m2", "var", "running_var", "invstd"):
        drawn = grid(32, 0.0625).abs_().add_(0.5)
    elif "weight" in spec.name or spec.name == "coupling":
        drawn = grid(8, 1 / 32)
    else:
        drawn = grid(32, 0.125 if len(spec.shape) == 4 else 0.0625)
    return laid_out(drawn, spec)


def laid_out(drawn: Tensor, spec: Spec) -> Tensor:
    """`drawn` with the strides of `spec`."""
    if drawn.stride() == spec.stride:
        return drawn
    return drawn.new_empty_strided(spec.shape, spec.stride).copy_(drawn)


def consistent_gram(given: dict[str, object], generator: torch.Generator) -> None:
    """A Gram matrix and sums of one random matrix in place of unrelated draws, whose variances would be negative."""
    gram = given["gram"]
    channels, rows = gram.shape[0], 4 * gram.shape[0]
    a = given["a"]
    pixels = a.shape[0] * a.shape[2] * a.shape[3]
    d = torch.randn(rows, channels, generator=generator, device=gram.device, dtype=torch.float64)
    given["gram"] = ((d.T @ d) * (pixels / rows)).to(gram.dtype)
    given["total"] = (d.sum(0) * (pixels / rows)).to(gram.dtype)


def changed(arguments: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    """`arguments` with `change` made to every tensor."""
    return tuple(change(value) if isinstance(value, Tensor) else value for value in arguments)


def widened(t: Tensor) -> Tensor:
    """`t` in float64, bits as they are."""
    return t.double() if t.is_floating_point() else t
