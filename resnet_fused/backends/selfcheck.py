"""Never trust a kernel on hardware it has not met: compare it with the float64 reference before its first use.

A kernel that declares `needs_selfcheck` runs on the cases of :mod:`.selfcheck_cases` the first time it is wanted for a
device and dtype. One that fails is switched off with one warning, and the next backend serves. The verdict is kept in
``$XDG_CACHE_HOME/resnet_fused/selfcheck`` (default ``~/.cache``), one file each, under a name made from everything it
depends on: op, device, versions, the kernel's build and these checks.

* The check runs in a thread of its own. Autograd, autocast, inference mode, fake tensors, functorch, tracing and the
  forced backend are all thread-local, so wherever the first use happens, the check sees none of them.
* Inside a CUDA graph capture nothing can be checked, as nothing may synchronise. A kernel without a verdict is then
  passed over, with a warning, and stays unjudged; one eager step before the capture avoids it.
* A kernel that raises is switched off for this process only: it may have been out of memory or without a compiler.
  A kernel that corrupts the device's context cannot be contained within the process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from ..ops import OPS, stat_dtype
from . import disk, selfcheck_cases, selfcheck_draws
from .declaration import Backend
from .selfcheck_draws import Case
from .verdicts import Verdicts

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one case of one kernel: a row of ``verify``."""

    op: str
    backend: str
    dtype: str
    case: str
    status: str  # "passed", "failed" or "skipped"
    error: float = 0.0  # largest difference from float64, relative to the largest value of that result
    allowed: float = 0.0
    note: str = ""  # why it failed without an error figure, or was skipped

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __str__(self) -> str:
        figures = self.note or f"error {self.error:.1e}, allowed {self.allowed:.1e}"
        return f"{self.backend} {self.op} ({self.dtype}), case {self.case!r}: {figures}"


def name_of(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


# Checking -------------------------------------------------------------------------------------------------------


#: Ops whose sums are of values that were rounded to the activations' dtype first, see `ops.lazy`.
SUMS_OF_ROUNDED = ("conv1x1", "conv1x1_dgrad", "conv1x1_wgrad", "conv1x1_backward", "gram")


def allowed_error(op: str, dtype: torch.dtype, result: Tensor) -> float:
    """One unit in the last place for a rounded result and for sums of rounded values, four for a convolution's.

    And float32's noise in sums.
    """
    if dtype == torch.float64:
        return 1e-10  # no reference is more exact; what a float32 shortcut would cost is far above
    noise = 64 * torch.finfo(stat_dtype(dtype)).eps
    if result.dtype != dtype or result.dim() != 4:
        return noise + (torch.finfo(dtype).eps if op in SUMS_OF_ROUNDED else 0.0)
    return noise + (4 if op.startswith("conv") else 1) * torch.finfo(dtype).eps


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where NaN or infinity stand in different places."""
    got, expected = got.detach().cpu().double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got.isnan(), expected.isnan()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = expected[finite].abs().max().item() or 1.0
    return (got[finite] - expected[finite]).abs().max().item() / scale


def results(returned, args: tuple) -> list[Tensor]:
    """What an op produced; an in-place op returns nothing and leaves it in its first argument."""
    if returned is None:
        return [args[0]]
    return [returned] if isinstance(returned, torch.Tensor) else list(returned)


def check_case(backend: Backend, op: str, case: Case, dtype: torch.dtype, device: torch.device) -> Verdict:
    """Run one case and compare values, shapes, dtypes and strides. Raises whatever the kernel raises."""
    placed = selfcheck_draws.place(case, dtype, device)
    row = functools.partial(Verdict, op, backend.name, name_of(dtype), case.name)
    reasons = backend.reasons(op, placed.args, placed.kwargs)
    if reasons:
        return row("skipped", note="; ".join(reasons))
    wide = selfcheck_draws.place(placed, torch.float64, torch.device("cpu"))
    promised = results(OPS[op].fake(*placed.args, **placed.kwargs), placed.args)
    got = results(backend.kernels[op].run(*placed.args, **placed.kwargs), placed.args)
    expected = results(OPS[op].reference(*wide.args, **wide.kwargs), wide.args)
    measured = [(0.0, 0.0)]
    for index, (g, e, p) in enumerate(zip(got, expected, promised, strict=True)):
        form, wanted = (tuple(g.shape), g.stride(), g.dtype), (tuple(p.shape), p.stride(), p.dtype)
        if form != wanted:
            return row("failed", note=f"result {index} has shape, strides, dtype {form} instead of {wanted}")
        if g.numel() == 0:
            continue
        error, bound = difference(g, e), 0.0 if g.dtype == torch.uint8 else allowed_error(op, dtype, g)
        if not error <= bound:
            return row("failed", error, bound, "" if bound else f"result {index} (mask) has wrong bits")
        measured.append((error, bound))
    return row("passed", *max(measured, key=lambda pair: (pair[0] / (pair[1] or 1.0), pair[1])))


def check_kernel(backend: Backend, op: str, dtype: torch.dtype, device: torch.device) -> list[Verdict]:
    """Run all cases of one kernel in a clean thread; an exception is a failed case."""

    def work() -> list[Verdict]:
        rows = []
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here, torch.no_grad():
            for case in selfcheck_cases.cases(op, dtype):
                try:
                    rows.append(check_case(backend, op, case, dtype, device))
                except Exception as error:
                    text = f"raised {type(error).__name__}: {str(error).strip()[:200]}"
                    rows.append(Verdict(op, backend.name, name_of(dtype), case.name, "failed", note=text))
        return rows

    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="resnet_fused-selfcheck") as pool:
        return pool.submit(work).result()


# Remembering ----------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where verdicts are kept between processes."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "resnet_fused" / "selfcheck"


@functools.cache
def _checks_identity() -> str:
    files = sorted(Path(__file__).parent.glob("selfcheck*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """The architecture a verdict holds for."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def identity(backend: Backend, op: str, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Everything that a verdict depends on."""
    return {
        "backend": backend.name,
        "op": op,
        "dtype": name_of(dtype),
        "device": device_name(device),
        "torch": torch.__version__,
        "build": backend.kernels[op].build,
        "checks": _checks_identity(),
    }


def _file(key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / f"{key['backend']}-{key['op']}-{key['dtype']}-{digest}.json"


def recall(key: dict[str, str]) -> str | None:
    """The objection on disk ("" for a trusted kernel); None if there is none, or none that can be read."""
    try:
        kept = json.loads(_file(key).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or kept.get("key") != key or not isinstance(kept.get("objection"), str):
        return None
    return kept["objection"]


def keep(key: dict[str, str], objection: str) -> None:
    """Write a verdict to disk; a directory that cannot be written only means checking again next time."""
    if key["build"]:  # without it nothing would tell when the kernel has changed
        with contextlib.suppress(OSError):
            disk.write_json(_file(key), {"key": key, "objection": objection})


# Deciding -------------------------------------------------------------------------------------------------------

_known = verdicts = Verdicts()
_warned: set[str] = set()
_lock = threading.Lock()


def forget() -> None:
    """Drop what this process remembers; the files stay."""
    _known.clear()
    _warned.clear()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def judge(backend: Backend, op: str, dtype: torch.dtype, device: torch.device, rows: list[Verdict]) -> str:
    """Turn the rows of one kernel into an objection, and remember it."""
    key = identity(backend, op, dtype, device)
    failed = [row for row in rows if row.status == "failed"]
    objection = f"failed its self-check on {key['device']}: {failed[0]}" if failed else ""
    if not any(row.passed for row in rows) and not failed:
        objection = f"took none of its self-check's cases: {rows[0]}"
    _known[backend.name, op, dtype, device] = objection
    if not any(row.note.startswith("raised") for row in failed):
        keep(key, objection)
    return objection


def _decide(backend: Backend, op: str, dtype: torch.dtype, device: torch.device) -> str:
    objection = recall(identity(backend, op, dtype, device))
    if objection is None and _capturing(device):
        text = "is not checked yet on this device and cannot be during a CUDA graph capture; run one step before it"
        _warn_once(f"resnet_fused: {backend.name} {op} ({name_of(dtype)}) {text}; the next backend serves")
        return text
    if objection is None:
        objection = judge(backend, op, dtype, device, check_kernel(backend, op, dtype, device))
    _known[backend.name, op, dtype, device] = objection
    if objection:
        off = f"resnet_fused: switched off {backend.name} {op} ({name_of(dtype)}), which {objection}"
        _warn_once(f"{off}; the next backend serves. `python -m resnet_fused verify` checks all kernels again")
    return objection


def objection(backend: Backend, op: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why `backend` may not run `op` there; empty if its kernel has proved itself, now or earlier."""
    known = _known.get((backend.name, op, dtype, device))
    if known is not None:
        return known
    if device.type == "cuda" and not torch.cuda.is_available():
        return "cannot be checked: there is no GPU"  # a fake tensor
    with _lock:
        known = _known.get((backend.name, op, dtype, device))
        return _decide(backend, op, dtype, device) if known is None else known


def check_all(device: torch.device | str, backends: Iterable[Backend]) -> list[Verdict]:
    """Run every kernel of `backends` that serves `device`, in every dtype it takes, whatever was known before.

    Verdicts of kernels that need a self-check replace the remembered ones.
    """
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    rows = []
    for backend in backends:
        if backend.unavailable or device.type not in backend.devices:
            continue
        for op, kernel in backend.kernels.items():
            for dtype in kernel.dtypes:
                checked = check_kernel(backend, op, dtype, device)
                if kernel.needs_selfcheck:
                    judge(backend, op, dtype, device, checked)
                rows += checked
    return rows
