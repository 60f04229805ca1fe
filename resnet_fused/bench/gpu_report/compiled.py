"""torch.compile with max-autotune on the first model: minutes of compiling, so it comes last and may be cut short."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .. import peers
from . import workload
from .context import Context

PEER = "compile, max-autotune"


def obstacle(context: Context) -> str:
    """Why there is nothing to compile here; a quick report has no time for it."""
    if context.settings.quick:
        return "a quick report compiles nothing"
    return peers.load("compile").unavailable(context.device)


def of(model: nn.Module) -> nn.Module:
    """`model`, to be compiled at its first call; it replays CUDA graphs of its own."""
    return torch.compile(model, mode="max-autotune", dynamic=False)


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """Evaluation first: it compiles one graph, a training step two."""
    name = context.settings.models[0]
    if reason := obstacle(context):
        yield name, lambda: context.skip(reason, name=name, peer=PEER)
        return
    yield f"{name}, evaluation", functools.partial(evaluation, context, name)
    yield f"{name}, training step", functools.partial(training, context, name)


def models_of(context: Context, name: str) -> dict[str, nn.Module]:
    """Eager, compiled, and fused: the first is the yardstick."""
    models = workload.pair(context, name)
    return {peers.STOCK: models[peers.STOCK], PEER: of(copy.deepcopy(models[peers.STOCK])), **models}


def evaluation(context: Context, name: str) -> None:
    batch = context.settings.batch
    x = workload.images(context, batch)
    runs = {p: workload.evaluation(context, model.eval(), x) for p, model in models_of(context, name).items()}
    workload.compare(context, name, runs, batch, mode="evaluation")


def training(context: Context, name: str) -> None:
    batch = context.settings.batch
    x = workload.images(context, batch)
    runs = {p: workload.training_step(context, model.train(), x) for p, model in models_of(context, name).items()}
    workload.compare(context, name, runs, batch, mode="training")
