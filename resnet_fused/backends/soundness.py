"""Whether ops have kernels that may be trusted: what the plan asks before it relies on them.

In `auto` the reference runs what no other backend takes. For one call that is right; a plan made for our kernels would
have it write and read every activation many times over. So a variant of a chain is taken only where each op that it
would run has a kernel: on a backend that is there, for the dtype, with its self-check passed.

A positive answer is kept until a verdict changes. While ``torch.compile`` traces, the question is answered, kernels
checked if need be, and the answer is a constant of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..ops import DATA_DTYPES, OPS
from . import cuda, tf32
from .constant import constant_in_graphs
from .declaration import Backend, Kernel
from .dispatch import backends, objection
from .selfcheck import judge

_sound: dict[tuple, int] = {}  # a question whose answer was "none is lacking" -> the number of verdicts' changes then


def forget() -> None:
    """Drop the answers that are kept: for tests, which replace backends."""
    _sound.clear()


@constant_in_graphs
def lacking(
    ops: tuple[str, ...], dtype: torch.dtype, device: torch.device | None, checks: bool, name: str = "auto"
) -> str:
    """The first of `ops` without a sound kernel for activations of `dtype`; empty: all have one.

    Args:
        device: where; None: a GPU that need not be there, on which Triton's kernels, and the compiled ones that there
            would be (:data:`.cuda.ASSUMED`), are taken to be sound.
        checks: check kernels that were not yet; else, for fake tensors, those without a verdict count as sound.
        name: of the only backend that counts.
    """
    question = (ops, dtype, device, checks, name)
    if _sound.get(question) == judge.count_of_changes():
        return ""
    checks = checks and (device is None or device.type != "cuda" or torch.cuda.is_available())
    for op in ops:
        # a backend without a kernel for a small op leaves it to the others
        own = "auto" if OPS[op].small else name
        if not _served(op, torch.float32 if OPS[op].vectors else dtype, device, checks, own):
            return op
    _sound[question] = judge.count_of_changes()
    return ""


@constant_in_graphs
def compiled(ops: tuple[str, ...], dtype: torch.dtype) -> bool:
    """Whether the compiled kernels for GPUs have all of `ops`, and take activations of `dtype`; float32 as TF32."""
    found = backends()["cuda"]
    has = not found.unavailable and all(op in found.kernels for op in ops)
    return has and (dtype != torch.float32 or tf32.allowed())


def takes(op: str, outputs: int, inputs: int, coupled: bool = False) -> bool:
    """Whether there is a kernel of a 1x1 op, wherever it runs, for a weight of these sizes; the reference is none.

    Args:
        coupled: and for a coupling of the inputs beside it.
    """
    declared = (backend.kernels.get(op) for backend in backends().values() if backend.name != "reference")
    return any(kernel is not None and not kernel.widths(outputs, inputs, coupled) for kernel in declared)


def too_wide(op: str, outputs: int, inputs: int, device: torch.device | None, name: str = "auto") -> list[str]:
    """What kernels of `op` have against a weight of these sizes; empty: one has nothing. Else as :func:`lacking`."""
    found: list[str] = []
    for _, kernel in _there(op, device, name):
        reasons = kernel.widths(outputs, inputs)
        if not reasons:
            return []
        found += reasons
    return found


def _there(op: str, device: torch.device | None, name: str) -> Iterator[tuple[Backend, Kernel]]:
    """The kernels of `op` that run on `device`; of the backend `name` alone, unless that is "auto"."""
    for backend in backends().values():
        kernel = backend.kernels.get(op)
        if backend.name == "reference" or kernel is None or name not in ("auto", backend.name):
            continue
        runs = (
            backend.name == "triton" if device is None else not backend.unavailable and device.type in backend.devices
        )
        if runs:
            yield backend, kernel


def _served(op: str, dtype: torch.dtype, device: torch.device | None, checks: bool, name: str) -> bool:
    if device is None and name in ("auto", "cuda") and op in cuda.ASSUMED and dtype in DATA_DTYPES:
        return True
    for backend, kernel in _there(op, device, name):
        if dtype not in kernel.dtypes:
            continue
        if device is None or not kernel.needs_selfcheck:
            return True
        question = (backend.name, op, dtype, device)
        if not (objection(*question) if checks else judge.remembered(*question)):
            return True
    return False
