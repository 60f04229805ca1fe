"""The self-checks that kernels must pass before they are used.

First those of every configuration that the models' steps start, as ``verify --model`` runs them, then the small cases
of every kernel that serves the device, in the dtype that training uses before others. Verdicts are remembered on disk:
the parts that follow need not judge again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from ...backends import Backend, backends, cards, check_call
from ...backends.selfcheck import judge
from ...ops import OPS
from ...traffic.calls import Call
from ...traffic.coverage import Coverage
from . import bandwidth
from .calls import calls_of
from .context import Context

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def kernels(context: Context) -> Iterator[tuple[torch.dtype, Backend, str]]:
    """Dtype, backend and op of everything that can run on the device; in a quick report in one dtype."""
    for dtype in (context.settings.dtype,) if context.settings.quick else DTYPES:
        for backend in backends().values():
            if not backend.unavailable and context.device.type in backend.devices and backend.name != "reference":
                chosen = [op for op in OPS if op in backend.kernels and dtype in backend.kernels[op].dtypes]
                yield from ((dtype, backend, op) for op in chosen)


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """One for each configuration of a model, and for each dtype, backend and op: one that dies leaves the others."""
    coverage = Coverage(cards.of(context.device))
    for model, training in bandwidth.plans(context) if context.on_gpu else ():
        for call in bandwidth.ordered(context, calls_of(context, model, training)):
            if coverage.add(call):
                name = f"{model}, {'training' if training else 'evaluation'}: {call.op} {call.label}"
                yield name, functools.partial(check_configuration, context, call)
    for dtype, backend, op in kernels(context):
        name = f"{backend.name} {op} {judge.name_of(dtype)}"
        yield name, functools.partial(check, context, backend, op, dtype)


def check_configuration(context: Context, call: Call) -> None:
    """Run the cases that start the same binaries in the same ways as `call` does."""
    write(context, check_call(call.op, call.args, {}, indexed(context)))


def check(context: Context, backend: Backend, op: str, dtype: torch.dtype) -> None:
    """Run the small cases of one kernel."""
    verdicts = judge.check_kernel(backend, op, dtype, indexed(context))
    if backend.kernels[op].needs_selfcheck:
        judge.judge(backend, op, dtype, indexed(context), verdicts)
    write(context, verdicts)


def indexed(context: Context) -> torch.device:
    """ "cuda" as "cuda:0": verdicts are of one device."""
    return torch.empty(0, device=context.device).device


def write(context: Context, verdicts: list[judge.Verdict]) -> None:
    """A row for each case."""
    for verdict in verdicts:
        fields = dataclasses.asdict(verdict)
        if verdict.status == "skipped":
            fields["reason"] = fields.pop("note")
        context.row(fields.pop("status"), name=fields.pop("op"), **fields)
