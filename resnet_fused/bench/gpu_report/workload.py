"""Models and what is run of them: a training step, an evaluation, each peer's in turn, with rows that compare them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from .. import equality, memory, named, peers
from ..timing import Rounds, Samples, clock_for, interleave
from .context import Context

Tensor = torch.Tensor
Lap = Callable[[str], None]


def pair(context: Context, name: str) -> dict[str, nn.Module]:
    """The stock model and the fused one, with the same weights, as a trained model has them."""
    torch.manual_seed(0)
    stock = named.build(name)
    equality.scatter_norms(stock)
    stock = stock.to(context.device, memory_format=torch.channels_last)
    return {peers.STOCK: stock, peers.OURS: peers.load(peers.OURS).prepare(copy.deepcopy(stock))}


def images(context: Context, batch: int) -> Tensor:
    """A batch of noise, channels_last."""
    size = context.settings.size
    x = torch.randn(batch, 3, size, size, device=context.device)
    return x.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def autocast(context: Context) -> Iterator[None]:
    """To the dtype of the report; float32 needs none."""
    dtype = context.settings.dtype
    with torch.autocast(context.device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield


def autocast_dtype(context: Context) -> torch.dtype | None:
    """As :mod:`..equality` takes it."""
    return None if context.settings.dtype == torch.float32 else context.settings.dtype


def training_step(context: Context, model: nn.Module, x: Tensor) -> Callable[[Lap], None]:
    """Forward and backward of a classification, as :func:`interleave` calls it."""
    labels = torch.arange(len(x), device=x.device) % 10

    def run(lap: Lap) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with autocast(context):
            loss = nn.functional.cross_entropy(model(x), labels)
        lap("forward")
        loss.backward()
        lap("backward")

    return run


def block_step(context: Context, model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[Lap], None]:
    """Forward and backward of one block, with a gradient for its input."""

    def run(lap: Lap) -> None:
        for tensor in (x, *model.parameters()):
            tensor.grad = None
        with autocast(context):
            out = model(x)
        lap("forward")
        out.backward(grad)
        lap("backward")

    return run


def evaluation(context: Context, model: nn.Module, x: Tensor) -> Callable[[Lap], None]:
    """A forward in evaluation mode without gradients."""

    def run(lap: Lap) -> None:
        with torch.no_grad(), autocast(context):
            model(x)
        lap("forward")

    return run


def rounds(context: Context) -> Rounds:
    """How often to measure."""
    return Rounds(2, 5, 0.2) if context.settings.quick else Rounds(5, 30, 2.0, warmup=2)


def compare(
    context: Context, name: str, runs: Mapping[str, Callable[[Lap], None]], batch: int, by_peer: Mapping | None = None,
    **fields: object,
) -> None:  # fmt: skip
    """Time `runs` in turn, and write a row for each peer and lap; the first that works is the yardstick.

    A peer that raises is a row with the reason. `by_peer`: further fields.
    """
    usable = {}
    for peer, run in runs.items():
        if context.attempt(lambda run=run: run(lambda lap: None), name=name, peer=peer, batch=batch, **fields):
            usable[peer] = run
    if not usable:
        return
    timed = interleave(usable, rounds(context), clock_for(context.device))
    laps = next(iter(timed.values()))
    for lap in laps if len(laps) > 2 else ("total",):
        yardstick = next(iter(timed.values()))[lap]
        for peer, found in timed.items():
            more = (by_peer or {}).get(peer, {}) if lap == "total" else {}
            row = times(found[lap]) | {"ratio": yardstick.median / found[lap].median}
            row |= {"images_per_s": batch / (found[lap].median * 1e-3)} if lap == "total" else {}
            context.row(name=name, lap=lap, peer=peer, batch=batch, **row, **more, **fields)


def times(samples: Samples) -> dict[str, object]:
    """The fields of a row."""
    quantiles = {"q10": samples.quantile(0.1), "q90": samples.quantile(0.9)}
    return {"ms": samples.median, **quantiles, "n": len(samples)}


def memory_of(context: Context, model: nn.Module, x: Tensor, step: Callable[[Lap], None]) -> dict[str, object]:
    """Bytes that autograd keeps for backward, and the peak of a GPU's memory in a step."""

    def forward() -> Tensor:
        with autocast(context):
            return model(x)

    found: dict[str, object] = {"saved_bytes": memory.saved_bytes(forward, model.parameters())}
    if context.on_gpu:
        step(lambda lap: None)  # what is cached for good is not a step's
        found["peak_bytes"] = memory.peak_cuda_bytes(lambda: step(lambda lap: None))
    return found


def agreement(context: Context, name: str, found: list[equality.Difference]) -> None:
    """A row of the tensor closest to its limit, and one for each beyond it."""
    worst = max(found, key=lambda d: d.fused / d.limit)
    wrong = [d for d in found if not d.agrees]
    for d in wrong or [worst]:
        match = {"error": d.fused, "allowed": d.limit, "stock": d.stock, "agrees": d.agrees}
        context.row("passed" if d.agrees else "failed", name=name, tensor=d.tensor, tensors=len(found), match=match)
