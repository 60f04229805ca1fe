"""Training batch norm of PyTorch and of cuDNN, on every shape of the first model: what a pass saved is worth.

Bytes are counted as three passes, the input read for the statistics and again to normalise, the output written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .. import equality, named
from . import measure
from .context import Context

Tensor = torch.Tensor
EPS, MOMENTUM = 1e-5, 0.1
NATIVE, CUDNN = "native", "cuDNN"
QUICK_SHAPES = 3


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """The copy, then each distinct shape, the largest first."""
    found: dict[str, float] = {}
    yield "device copy", lambda: found.update(copy=measure.copy_row(context))
    name = context.settings.models[0]
    shapes = sorted(shapes_of(context, name).items(), key=lambda item: -item[0][0] * item[0][1] ** 2 * item[1])
    for (channels, size), used in shapes[: QUICK_SHAPES if context.settings.quick else None]:
        run = functools.partial(norm, context, channels, size, used, found)
        yield f"{name}, {channels} channels of {size}x{size}", run


def shapes_of(context: Context, name: str) -> dict[tuple[int, int], int]:
    """Channels and height of every batch norm's input, with how often the model has it."""
    found: dict[tuple[int, int], int] = {}

    def note(module: nn.Module, args: tuple) -> None:
        key = args[0].shape[1], args[0].shape[2]
        found[key] = found.get(key, 0) + 1

    model = named.build(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, context.settings.size, context.settings.size))  # shapes alone count
    return found


def norm(context: Context, channels: int, size: int, used: int, found: dict[str, float]) -> None:
    """Both on the same inputs, each against float64."""
    shape, dtype = (context.settings.batch, channels, size, size), context.settings.dtype
    bytes = 3 * dtype.itemsize * torch.Size(shape).numel()
    if "copy" not in found:  # this process took over from one that died
        found["copy"] = measure.copy_bandwidth(context)[0]
    count = measure.number_of_sets(bytes, context.device)
    sets = [_images(context, shape, dtype) for _ in range(count)]
    vectors = [torch.rand(channels, device=context.device) + 0.5 for _ in range(4)]
    exact = native(sets[0].double(), *(v.double() for v in vectors))
    for peer, run in ((NATIVE, native), (CUDNN, cudnn)):
        fields = {"name": "batch norm, training", "case": "x".join(map(str, shape)), "used": used, "peer": peer}
        if peer == CUDNN and not context.on_gpu:
            context.skip("cuDNN needs a GPU", **fields)
            continue

        def one(run=run, fields=fields) -> None:
            error = equality.error(run(sets[0], *vectors), exact)
            allowed = 4 * equality.rounding_floor(dtype)
            calls = [functools.partial(run, x, *vectors) for x in sets]
            timing = measure.time_calls(calls, context.device, context.settings.quick)
            rate = bytes / (timing.median * 1e-3)
            figures = {"bytes": bytes, "gb_per_s": rate / 1e9, "share_of_copy": rate / found["copy"]}
            match = {"error": error, "allowed": allowed, "agrees": error <= allowed}
            context.row("measured" if error <= allowed else "error", **fields, **figures, **timing.row(), match=match)

        context.attempt(one, **fields)


def _images(context: Context, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, device=context.device).to(dtype)
    return drawn.contiguous(memory_format=torch.channels_last)


def native(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """What ``nn.BatchNorm2d`` calls; PyTorch may choose cuDNN for it as well."""
    return nn.functional.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)


def cudnn(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """cuDNN's own, whatever PyTorch would choose."""
    return torch.cudnn_batch_norm(x, weight, bias, mean, var, True, MOMENTUM, EPS)[0]
