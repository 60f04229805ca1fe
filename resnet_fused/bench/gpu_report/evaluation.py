"""Evaluation at several batch sizes: eager, fused, and cuDNN's fused operations on folded weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch

from .. import equality, peers
from . import cudnn, workload
from .context import Context

BATCHES = (1, 8, 32)
CHECKED = 2  # images on which every peer is compared with float64
#: A peer's error against float64 may be so many times eager's: folding rounds weights once more.
FACTOR = 4.0


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """For each model the batches, the report's own last."""
    for name in context.settings.models:
        built = functools.cache(functools.partial(models_of, context, name))
        yield f"{name}, values", functools.partial(values, context, name, built)
        for batch in sorted({*(BATCHES[:1] if context.settings.quick else BATCHES), context.settings.batch}):
            yield f"{name}, batch {batch}", functools.partial(measure, context, name, built, batch)


def models_of(context: Context, name: str) -> dict[str, torch.nn.Module]:
    """Every peer's model; one that cannot be made here is a row."""
    models = {peer: model.eval() for peer, model in workload.pair(context, name).items()}
    reason = cudnn.unavailable(context.device)
    if reason:
        context.skip(reason, name=name, peer=cudnn.PEER, mode="evaluation")
        return models

    def prepare() -> None:
        folded = cudnn.prepare(copy.deepcopy(models[peers.STOCK]), context.settings.dtype)
        models[cudnn.PEER] = folded

    context.attempt(prepare, name=name, peer=cudnn.PEER, mode="evaluation")
    return models


def values(context: Context, name: str, built: Callable) -> None:
    """Scores of every peer against float64; the fused model's, and other peers', may err as eager does."""
    models, x = built(), workload.images(context, CHECKED)
    with torch.no_grad():
        exact = copy.deepcopy(models[peers.STOCK]).double()(x.double())
        floor = equality.rounding_floor(context.settings.dtype)
        eager = None
        for peer, model in models.items():

            def one(peer=peer, model=model) -> None:
                nonlocal eager
                with workload.autocast(context):
                    error = equality.error(model(x), exact)
                eager = error if eager is None else eager
                allowed = FACTOR * eager + floor
                match = {"error": error, "allowed": allowed, "stock": eager, "agrees": error <= allowed}
                status = "passed" if error <= allowed else "failed" if peer == peers.OURS else "error"
                context.row(status, name=name, mode="evaluation", lap="values", peer=peer, match=match)

            context.attempt(one, name=name, mode="evaluation", lap="values", peer=peer)


def measure(context: Context, name: str, built: Callable, batch: int) -> None:
    """All peers in turn."""
    x = workload.images(context, batch)
    runs = {peer: workload.evaluation(context, model, x) for peer, model in built().items()}
    workload.compare(context, name, runs, batch, mode="evaluation")
