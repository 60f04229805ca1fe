"""The self-checks that kernels must pass before they are used, of every backend that serves the device.

Kernels of GPUs come first, in the dtype that training uses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from ...backends import Backend, backends
from ...backends import selfcheck as checks
from ...ops import OPS
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
    """One for each dtype, backend and op: an item that dies leaves the others."""
    for dtype, backend, op in kernels(context):
        name = f"{backend.name} {op} {checks.name_of(dtype)}"
        yield name, functools.partial(check, context, backend, op, dtype)


def check(context: Context, backend: Backend, op: str, dtype: torch.dtype) -> None:
    """Run the cases of one kernel; its verdict is remembered for the parts that follow, as ``verify`` does it."""
    device = torch.empty(0, device=context.device).device  # "cuda" becomes "cuda:0"
    verdicts = checks.check_kernel(backend, op, dtype, device)
    if backend.kernels[op].needs_selfcheck:
        checks.judge(backend, op, dtype, device, verdicts)
    for verdict in verdicts:
        fields = dataclasses.asdict(verdict)
        context.row(fields.pop("status"), name=op, **fields)
