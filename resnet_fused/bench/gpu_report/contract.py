"""The contract tests of the ops, on every backend that serves the device: values, layouts, guards, arguments untouched.

There are more cases than time to compile them all: every eighth of each op comes first, then the next of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from ...backends import Backend
from ...testing import cases, check
from .context import Context, reason_of
from .selfcheck import kernels

STRIDE = 8
QUICK_STRIDE = 24


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """One for each kernel and share of its cases."""
    torch.backends.cudnn.allow_tf32 = False  # bounds are those of float32
    stride = QUICK_STRIDE if context.settings.quick else STRIDE
    for first in range(1 if context.settings.quick else stride):
        for dtype, backend, op in kernels(context):
            short = str(dtype).removeprefix("torch.")
            name = f"{backend.name} {op} {short}, cases {first + 1}, {first + 1 + stride}, ..."
            yield name, functools.partial(run_cases, context, backend, op, dtype, first, stride)


def run_cases(context: Context, backend: Backend, op: str, dtype: torch.dtype, first: int, stride: int) -> None:
    """A row for the cases that ran, and one for each that broke the contract."""
    fields = {"name": op, "backend": backend.name, "dtype": str(dtype).removeprefix("torch.")}
    ran, refused = 0, set()
    for case in cases(op, dtype)[first::stride]:
        try:
            reasons = check(backend, op, case, dtype, context.device)
        except Exception as error:  # the device may be lost: the next case would say so
            context.row("failed", case=case.name, reason=reason_of(error), **fields)
            if not isinstance(error, AssertionError):
                raise
            continue
        refused |= set(reasons)
        ran += not reasons
    reason = {} if ran else {"reason": "; ".join(sorted(refused)) or "no case here, or none within the contract"}
    context.row("passed" if ran else "skipped", ran=ran, **reason, **fields)
