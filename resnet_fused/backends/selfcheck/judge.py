"""Never trust a kernel on hardware it has not met: compare it with the float64 reference before its first use.

A kernel that declares `needs_selfcheck` runs the first time it is wanted for a device and dtype, on cases whose results
are known. One that tells its `launches` is judged for each :mod:`configuration <.configurations>` that calls
bring, on the smallest cases that run the same binaries in the same ways; any other on those of :mod:`.cases`.
What fails is switched off with one warning, a configuration alone, and the next backend serves. Verdicts are kept on
disk (:mod:`.memory`).

* The check runs in a thread of its own. Autograd, autocast, inference mode, fake tensors, functorch, tracing and the
  forced backend are all thread-local, so wherever the first use happens, the check sees none of them.
* Inside a CUDA graph capture nothing can be checked, as nothing may synchronise. A kernel without a verdict is then
  passed over, with a warning, and stays unjudged; one eager step before the capture avoids it.
* A kernel that raises is switched off for this process only: it may have been out of memory or without a compiler.
  A kernel that corrupts the device's context cannot be contained within the process.
* Once judged, a call costs a key of its arguments' forms and a look-up.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import warnings
from collections.abc import Hashable, Iterable

import torch

from ...ops import stat_dtype
from .. import cards
from ..declaration import Backend, Kernel
from ..verdicts import Verdicts
from . import cases, configurations
from .compare import Verdict, check, check_case, difference, name_of, results
from .memory import cache_dir, identity, keep, recall, recall_failure

__all__ = [
    "Verdict",
    "cache_dir",
    "check_all",
    "check_call",
    "check_case",
    "count_of_changes",
    "difference",
    "doubt",
    "forget",
    "identity",
    "keep",
    "objection",
    "recall",
    "remembered",
    "results",
]

ANY = ""  # in place of a configuration's digest: the op as such, by its small cases
MOST_CALLS = 8192  # remembered; more come from ever new sizes of images
PATIENCE = 4.0  # seconds of checks after which a process tells what takes so long

_known = Verdicts()  # (backend, op, dtype, device, configuration) -> objection, "" for trusted
_failed: dict[tuple, str] = {}  # (backend, op, dtype, device) -> objection to one configuration, on disk or here
_calls: dict[tuple, str] = {}  # (backend, op, device, forms of the arguments) -> objection
_warned: set[str] = set()
_lock = threading.Lock()


def forget() -> None:
    """Drop what this process remembers; the files stay."""
    for memory in (_known, _failed, _calls, _warned):
        memory.clear()
    _waiting.__init__()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)


class _Waiting:
    """Tells on stderr, where first checks keep a process waiting, what it waits for."""

    def __init__(self) -> None:
        self.checks, self.seconds, self.told = 0, 0.0, PATIENCE

    def note(self, seconds: float, device: torch.device) -> None:
        """One more configuration was compiled and checked."""
        self.checks, self.seconds = self.checks + 1, self.seconds + seconds
        if self.seconds >= self.told and device.type == "cuda":
            self.told = 2 * self.seconds
            text = (
                f"compiled and checked {self.checks} configurations of GPU kernels in {self.seconds:.0f} s, and goes on"
            )
            hint = "once for each device; `python -m resnet_fused warmup` compiles them beforehand, in parallel"
            print(f"resnet_fused: {text}, more may follow; {hint}", file=sys.stderr, flush=True)


_waiting = _Waiting()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# Judging ----------------------------------------------------------------------------------------------------------


def _small_cases(backend: Backend, op: str, dtype: torch.dtype) -> list[cases.Case]:
    """But of the reference, which has no tiles, not those that fill a GPU with the largest: they take seconds each."""
    found = [*cases.cases(op, dtype), *backend.kernels[op].more_cases(dtype)]
    return [case for case in found if not (case.fills_gpus and backend.name == "reference")]


def check_kernel(backend: Backend, op: str, dtype: torch.dtype, device: torch.device) -> list[Verdict]:
    """Run the small cases of one op."""
    return check(backend, op, dtype, device, functools.partial(_small_cases, backend, op, dtype))


def check_call(backend: Backend, op: str, args: tuple, kwargs: dict, device: torch.device) -> tuple[str, list[Verdict]]:
    """Run the cases that stand for a call, and remember what became of them: the objection, and a row for each case."""
    kernel, dtype, card = backend.kernels[op], args[0].dtype, cards.of(device)
    wanted = configurations.of_call(kernel, args, kwargs, card)
    make = functools.partial(configurations.cases, kernel, op, args, kwargs, card)
    rows = check(backend, op, dtype, device, make)
    return judge(backend, op, dtype, device, rows, wanted.digest), rows


def judge(
    backend: Backend, op: str, dtype: torch.dtype, device: torch.device, rows: list[Verdict], configuration: str = ANY
) -> str:
    """Turn the rows of one kernel into an objection, and remember it."""
    key = identity(backend, op, dtype, device, configuration)
    failed = [row for row in rows if row.status == "failed"]
    objection = f"failed its self-check on {key['device']}: {failed[0]}" if failed else ""
    if not any(row.passed for row in rows) and not failed:
        objection = f"took none of its self-check's cases: {rows[0]}" if rows else "has no case in its self-check"
    if configuration and any(row.status == "skipped" for row in rows) and not objection:
        objection = f"did not take a case of its self-check: {next(row for row in rows if row.status == 'skipped')}"
    _remember(backend, op, dtype, device, configuration, objection)
    if not any(row.note.startswith("raised") for row in failed):
        keep(key, objection)
    return objection


def _remember(backend: Backend, op: str, dtype, device, configuration: str, objection: str) -> None:
    kernel = backend.name, op, dtype, device
    _known[(*kernel, configuration)] = objection
    if configuration:
        _calls.clear()  # few are new after the first step; a verdict may have been replaced
        failed = (other for key, other in _known.items() if key[:4] == kernel and key[4] and other)
        _failed[kernel] = next(failed, "")


def _decide(backend: Backend, op: str, dtype, device, configuration: str, work) -> str:
    """The verdict in memory, on disk, or that `work` brings about."""
    known = _known.get((backend.name, op, dtype, device, configuration))
    if known is not None:
        return known
    objection = recall(identity(backend, op, dtype, device, configuration))
    if objection is None and _capturing(device):
        text = "is not checked yet on this device and cannot be during a CUDA graph capture; run one step before it"
        _warn_once(f"resnet_fused: {backend.name} {op} ({name_of(dtype)}) {text}; the next backend serves")
        return text
    if objection is None:
        begun = time.perf_counter()
        objection = work()
        _waiting.note(time.perf_counter() - begun, device)
    _remember(backend, op, dtype, device, configuration, objection)
    if objection:
        off = f"resnet_fused: switched off {backend.name} {op} ({name_of(dtype)}), which {objection}"
        _warn_once(f"{off}; the next backend serves. `python -m resnet_fused verify` checks all kernels again")
    return objection


# Asking -----------------------------------------------------------------------------------------------------------


def objection(backend: Backend, op: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why `backend` may not run `op` there; empty if its kernel has proved itself, now or earlier.

    Its small cases decide; of a kernel that is judged by configuration one of them, and whether any configuration that
    was met has failed, in this process or before.
    """
    known = _known.get((backend.name, op, dtype, device, ANY))
    if known is None:
        if device.type == "cuda" and not torch.cuda.is_available():
            return "cannot be checked: there is no GPU"  # a fake tensor
        with _lock:
            known = _decide(backend, op, dtype, device, ANY, lambda: _check_op(backend, op, dtype, device))
    if known or backend.kernels[op].launches is None:
        return known
    failed = _failed.get((backend.name, op, dtype, device))
    if failed is None:
        failed = _failed[backend.name, op, dtype, device] = recall_failure(identity(backend, op, dtype, device))
    return failed


def remembered(backend: str, op: str, dtype: torch.dtype, device: torch.device) -> str:
    """What :func:`objection` would say by what is in memory alone; empty too where nothing is known."""
    return _known.get((backend, op, dtype, device, ANY), "") or _failed.get((backend, op, dtype, device), "")


def count_of_changes() -> int:
    """How often a verdict was new or another than before: for those who keep what follows from them."""
    return _known.changes


def _check_op(backend: Backend, op: str, dtype: torch.dtype, device: torch.device) -> str:
    make = functools.partial(_small_cases, backend, op, dtype)
    if backend.kernels[op].launches is not None:
        make = lambda: [cases.one(op, dtype)]  # noqa: E731
    return judge(backend, op, dtype, device, check(backend, op, dtype, device, make))


def doubt(backend: Backend, op: str, args: tuple, kwargs: dict) -> str:
    """Why `backend` may not run `op` on these arguments; empty if a kernel of just this configuration proved itself."""
    x, kernel = args[0], backend.kernels[op]
    if kernel.launches is None:
        return objection(backend, op, x.dtype, x.device)
    key = (backend.name, op, x.device, kernel.mode(x.dtype), forms(args), tuple(kwargs), forms(kwargs.values()))
    known = _calls.get(key)
    return _meet(key, backend, op, args, kwargs) if known is None else known


def forms(values: Iterable) -> tuple[Hashable, ...]:
    """What a call's binaries can depend on, of each of its arguments."""
    return tuple(
        (v.shape, v.dtype, v.data_ptr() % 16) if isinstance(v, torch.Tensor) else tuple(v) if isinstance(v, list) else v
        for v in values
    )


def _meet(key: tuple, backend: Backend, op: str, args: tuple, kwargs: dict) -> str:
    """The verdict on a call that was not met before, in most cases of a configuration that was."""
    dtype, device = args[0].dtype, args[0].device
    if device.type == "cuda" and not torch.cuda.is_available():
        return "cannot be checked: there is no GPU"  # a fake tensor
    with _lock:
        wanted = configurations.of_call(backend.kernels[op], args, kwargs, cards.of(device)).digest
        found = _decide(backend, op, dtype, device, wanted, lambda: check_call(backend, op, args, kwargs, device)[0])
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        if (backend.name, op, dtype, device, wanted) in _known:  # else it was passed over during a capture
            _calls[key] = found
    return found


def _meant_by(dtype: torch.dtype, kernel: Kernel) -> list[torch.dtype]:
    found = dtype if dtype in kernel.dtypes else stat_dtype(dtype)
    return [found] if found in kernel.dtypes else []


def check_all(
    device: torch.device | str, backends: Iterable[Backend], dtype: torch.dtype | None = None
) -> list[Verdict]:
    """Run every kernel of `backends` that serves `device`, in every dtype it takes, whatever was known before.

    `dtype`: only for activations of that one; a kernel that does not take it is given their statistics, in theirs.
    Verdicts of kernels that need a self-check replace the remembered ones.
    """
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    rows = []
    for backend in backends:
        if backend.unavailable or device.type not in backend.devices:
            continue
        for op, kernel in backend.kernels.items():
            for each in kernel.dtypes if dtype is None else _meant_by(dtype, kernel):
                checked = check_kernel(backend, op, each, device)
                if kernel.needs_selfcheck:
                    judge(backend, op, each, device, checked)
                rows += checked
    return rows
