"""Whether ops have kernels that may be trusted: what the plan asks before it relies on them.

In `auto` the reference runs what no other backend takes. For one call that is right; a plan made for our kernels would
have it write and read every activation many times over. So a variant of a chain is taken only where each op that it
would run has a kernel: on a backend that is there, for the dtype, with its self-check passed.

A positive answer is kept until a verdict changes. While ``torch.compile`` traces, the question is answered, kernels
checked if need be, and the answer is a constant of the graph.
"""

from __future__ import annotations

import torch

from ..ops import DATA_DTYPES, OPS
from . import cuda
from .dispatch import backends, objection
from .selfcheck import judge

_sound: dict[tuple, int] = {}  # a question whose answer was "none is lacking" -> the number of verdicts' changes then


def forget() -> None:
    """Drop the answers that are kept: for tests, which replace backends."""
    _sound.clear()


@torch.compiler.assume_constant_result
def lacking(ops: tuple[str, ...], dtype: torch.dtype, device: torch.device | None, checks: bool) -> str:
    """The first of `ops` without a sound kernel for activations of `dtype`; empty: all have one.

    Args:
        device: where; None: a GPU that need not be there, on which Triton's kernels, and the compiled ones that there
            would be (:data:`.cuda.ASSUMED`), are taken to be sound.
        checks: check kernels that were not yet; else, for fake tensors, those without a verdict count as sound.
    """
    question = (ops, dtype, device, checks)
    if _sound.get(question) == judge.count_of_changes():
        return ""
    checks = checks and (device is None or device.type != "cuda" or torch.cuda.is_available())
    for op in ops:
        if not _served(op, torch.float32 if OPS[op].vectors else dtype, device, checks):
            return op
    _sound[question] = judge.count_of_changes()
    return ""


def takes(op: str, outputs: int, inputs: int, coupled: bool = False) -> bool:
    """Whether there is a kernel of a 1x1 op, wherever it runs, for a weight of these sizes; the reference is none.

    Args:
        coupled: and for a coupling of the inputs beside it.
    """
    declared = (backend.kernels.get(op) for backend in backends().values() if backend.name != "reference")
    return any(kernel is not None and not kernel.widths(outputs, inputs, coupled) for kernel in declared)


def _served(op: str, dtype: torch.dtype, device: torch.device | None, checks: bool) -> bool:
    if device is None and op in cuda.ASSUMED and dtype in DATA_DTYPES:
        return True
    for backend in backends().values():
        kernel = backend.kernels.get(op)
        if backend.name == "reference" or kernel is None or dtype not in kernel.dtypes:
            continue
        if device is None:
            if backend.name == "triton":
                return True
        elif not backend.unavailable and device.type in backend.devices:
            if not kernel.needs_selfcheck:
                return True
            question = (backend.name, op, dtype, device)
            if not (objection(*question) if checks else judge.remembered(*question)):
                return True
    return False
