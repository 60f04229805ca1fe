"""Compile beforehand, in parallel, every Triton kernel that a step of a model starts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ..backends import cards
from ..backends import triton as room
from ..backends.selfcheck import cases, configurations, draws
from ..plan import devices
from ..plan.devices import Device
from .calls import Call, calls, device_of

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Warmed:
    """The result of :func:`warmup`."""

    kernels: int  # binaries that a step and the checks before it start
    compiled: int  # of them, those that were not in Triton's cache yet
    seconds: float
    failures: tuple[str, ...] = ()  # of those that do not compile

    def __str__(self) -> str:
        text = f"{self.kernels} Triton kernels, {self.compiled} of them compiled in {self.seconds:.0f} s"
        return "\n".join([text, *(f"  does not compile: {failure}" for failure in self.failures)])


def launches(found: Iterable[Call], card: cards.Card, dtype: torch.dtype) -> list:
    """Everything that Triton starts for these calls, and for the self-checks before them."""
    kernels, started = room.kernels(), []
    for call in (call for call in found if call.op in kernels):
        kernel, args = kernels[call.op], call.args
        own = kernel.launches(args, {}, card)
        wanted, whole = configurations.configuration(own), None
        with contextlib.suppress(KeyError):  # an op without forms is checked by its small cases alone
            whole = configurations.problem(call.op, args, {})
        started += own
        if whole is not None:
            for candidate in configurations.covering(kernel, whole, wanted, card):
                started += kernel.launches(*candidate.problem.meta(), candidate.card)
    for op in {call.op for call in found if call.op in kernels}:
        for case in cases.cases(op, dtype):
            placed = draws.place(case, dtype, torch.device("cpu"))
            if placed.args[0].dtype in kernels[op].dtypes and not kernels[op].unsupported(
                *placed.args, **placed.kwargs
            ):
                started += kernels[op].launches(placed.args, placed.kwargs, card)
    return started


def warmup(
    model: nn.Module,
    example: Tensor,
    *,
    capability: int | None = None,
    workers: int = 0,
    tell: Callable | None = None,
) -> Warmed:
    """Compile, in parallel and into Triton's cache on disk, every kernel that a step of `model` on `example` starts.

    Otherwise the first step compiles them one by one. Runs nothing on the GPU. Call it where the step will be: with
    `model` in training or evaluation mode, and under the same ``torch.autocast``. Under ``torch.distributed`` the first
    process of each machine compiles, the others wait for it.

    Args:
        model: need not be fused yet, and is not touched.
        example: an input, or a meta tensor of its shape and dtype.
        capability: of the GPU to compile for, e.g. 90; None: the one that `example` is on, else the current one.
        workers: processes that compile; 0: as many as there are cores.
        tell: called after each kernel with what became of it and the number of kernels; None: a line on stderr each
            five seconds.

    Raises:
        RuntimeError: Triton cannot be imported, or no GPU is there and `capability` is None.
    """
    reason = room.missing_triton()
    if reason:
        raise RuntimeError(f"warmup: {reason}")
    card, device = _card(example, capability)
    with _first_on_this_machine() as first:
        if not first:
            return Warmed(0, 0, 0.0)
        begun = time.perf_counter()
        from ..backends.triton import compile

        kind = "cuda" if example.device.type == "meta" else example.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else example.dtype
        found = calls(model, example, model.training, device, dtype)
        done = compile.compile_all(launches(found, card, dtype), card.arch, workers, tell or _Lines())
        failures = tuple(f"{each.kernel}: {each.error}" for each in done if each.error)
        compiled = sum(not each.cached and not each.error for each in done)
        return Warmed(len(done), compiled, time.perf_counter() - begun, failures)


def _card(example: Tensor, capability: int | None) -> tuple[cards.Card, Device]:
    if capability is not None:
        card = cards.Card(capability)
        return card, device_of(card)
    if not torch.cuda.is_available():
        raise RuntimeError("warmup: there is no GPU; pass capability, e.g. 90, to compile for one that is elsewhere")
    device = example.device if example.device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return cards.of(device), devices.of(device)


@contextlib.contextmanager
def _first_on_this_machine() -> Iterator[bool]:
    """Whether this process compiles; the others of ``torch.distributed`` are let in when it has."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = int(os.environ.get("LOCAL_RANK", torch.distributed.get_rank() if distributed else 0)) == 0
    try:
        yield first or not distributed
    finally:
        if distributed:
            torch.distributed.barrier()


class _Lines:
    """Tells on stderr how far it is, each five seconds."""

    def __init__(self) -> None:
        self.count, self.told = 0, time.perf_counter()

    def __call__(self, done, total: int) -> None:
        self.count += 1
        if time.perf_counter() - self.told > 5:
            self.told = time.perf_counter()
            print(f"resnet_fused: compiled {self.count} of {total} Triton kernels", file=sys.stderr, flush=True)
