"""Steps and evaluations launched one by one and replayed as one CUDA graph: the difference is the host's time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .. import equality
from . import workload
from .context import Context

Tensor = torch.Tensor
WARM_STEPS = 3
GRAPH = ", CUDA graph"
SAME = 0.05  # a replay's distance from the plain step: cuDNN may add in another order each time
NO_GPU = "CUDA graphs need a GPU"


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """Of the first model: where the host's time weighs most, first."""
    name, batch = context.settings.models[0], context.settings.batch
    if not context.on_gpu:
        yield name, lambda: context.skip(NO_GPU, name=name)
        return
    for count in sorted({1, batch}):
        yield f"{name}, evaluation, batch {count}", functools.partial(measure, context, name, count, False)
    for count in sorted({max(2, batch // 8), batch}):
        yield f"{name}, training step, batch {count}", functools.partial(measure, context, name, count, True)


def measure(context: Context, name: str, batch: int, training: bool) -> None:
    """Each peer with and without a graph, in turn; a peer that cannot be captured is a row."""
    x, runs = workload.images(context, batch), {}
    fields = {"name": name, "batch": batch, "mode": "training" if training else "evaluation"}
    for peer, model in workload.pair(context, name).items():
        step = functools.partial(once, context, model.train(training), x)
        runs[peer] = _lap(step)

        def capture(peer=peer, step=step) -> None:
            plain = step().clone()
            graph, result = captured(step)
            graph.replay()
            error = equality.error(result, plain)
            match = {"error": error, "allowed": SAME, "agrees": error <= SAME}
            context.row(
                "passed" if error <= SAME else "failed", lap="values", peer=f"{peer}{GRAPH}", match=match, **fields
            )
            runs[f"{peer}{GRAPH}"] = _lap(graph.replay)

        context.attempt(capture, peer=f"{peer}{GRAPH}", **fields)
    workload.compare(context, name, runs, batch, mode=fields["mode"])


def once(context: Context, model: nn.Module, x: Tensor) -> Tensor:
    """The scores of an evaluation; of a training step the gradient furthest from the loss."""
    if not model.training:
        with torch.no_grad(), workload.autocast(context):
            return model(x)
    workload.training_step(context, model, x)(lambda lap: None)
    return next(model.parameters()).grad


def _lap(step: Callable[[], object]) -> Callable[[Callable[[str], None]], None]:
    """`step` as `interleave` calls it: those with and without a graph have the same single lap."""

    def run(lap: Callable[[str], None]) -> None:
        step()
        lap("step")

    return run


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`step` as a graph, and where its result lies, after a few on a stream of their own, as PyTorch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result
