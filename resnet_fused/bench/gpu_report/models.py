"""Whole models, fused beside eager: values against float64, then a training step, what it keeps, and its peak."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

import resnet_fused

from ...plan import choose, devices
from .. import equality, named, peers
from . import workload
from .context import Context

EQUALITY_BATCH = 4


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """The first model in full, then the others."""
    first = context.settings.models[0]
    for name in context.settings.models:
        built = functools.cache(functools.partial(workload.pair, context, name))
        if name == first:
            yield f"{name}, values", functools.partial(values, context, name, built)
        yield f"{name}, training step", functools.partial(step, context, name, built)
        if name == first:
            yield f"{name}, predicted", functools.partial(predicted, context, name)
        else:
            yield f"{name}, values", functools.partial(values, context, name, built)


def values(context: Context, name: str, built: Callable) -> None:
    """Outputs, gradients and buffers of the whole model and of each distinct block, against float64."""
    models = built()
    x = workload.images(context, EQUALITY_BATCH if context.on_gpu else 2)
    names = [row.name for row in resnet_fused.report(models[peers.OURS]).fused]
    if context.settings.quick:
        names = names[-2:]
    with choose.fusing_all():
        found = equality.check(*models.values(), x, names, workload.autocast_dtype(context))
    workload.agreement(context, name, found)


def step(context: Context, name: str, built: Callable) -> None:
    """Forward, backward and both, with bytes kept and the peak."""
    batch = context.settings.batch
    models = {peer: model.train() for peer, model in built().items()}
    x = workload.images(context, batch)
    runs = {peer: workload.training_step(context, model, x) for peer, model in models.items()}
    used: dict[str, dict] = {}
    for peer, model in models.items():

        def measure(peer=peer, model=model) -> None:
            used[peer] = workload.memory_of(context, model, x, runs[peer])

        context.attempt(measure, name=name, lap="memory", peer=peer, batch=batch)
    workload.compare(context, name, runs, batch, used, mode="training")


def predicted(context: Context, name: str) -> None:
    """What ``explain`` expects of the same step on this device, where it knows it."""
    board = torch.cuda.get_device_name(context.device) if context.on_gpu else ""
    key = next((key for key, known in devices.DEVICES.items() if known.reported == board), None)
    if key is None:
        context.skip("explain predicts times of known GPUs only", name=name)
        return
    settings = context.settings
    size = (settings.batch, 3, settings.size, settings.size)
    explained = resnet_fused.explain(named.build(name), size, dtype=settings.dtype, device=key)
    (expected,) = explained.predictions
    sides = {peers.STOCK: expected.stock, peers.OURS: expected.fused, "compile": expected.compiled}
    for peer, seconds in sides.items():
        times = {"predicted_ms": seconds.low, "predicted_high_ms": seconds.high, "predicted_host_ms": seconds.host}
        row = {field: 1e3 * value for field, value in times.items()}
        context.row("passed", name=name, mode="training", lap="predicted", peer=peer, **row)
