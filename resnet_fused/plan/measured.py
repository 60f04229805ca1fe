"""Which variant of a program was fastest when it was measured: choices on disk, asked before the plan's cost model.

:func:`resnet_fused.tune` measures and stores them, see :mod:`.tune`. They are kept in
``$XDG_CACHE_HOME/resnet_fused/plans`` (default ``~/.cache``), one file for everything that a time depends on: device,
versions, and the sources of this package. A file is read once per process and device, when the first program runs
there; one that is missing or makes no sense is as good as none. A row holds for a program's geometry, the shape and
dtype of its input, who runs its ops and, on the CPU, the number of threads.

Nothing is asked for fake tensors, so :func:`resnet_fused.explain` tells the cost model's choice. Nothing is read while
``torch.compile`` traces: it takes what this process has read before, by :func:`load` or by one eager step.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import library
from ..backends import backends, disk
from ..backends.selfcheck import memory
from ..steps.program import Call
from . import devices
from .keys import key_of, threads
from .variants import Variant

#: Sub-packages whose sources decide how long a program takes.
SOURCES = ("ops", "backends", "steps", "plan", "blocks")

Shape = tuple[int, ...]
Rows = dict[str, dict[Shape, Variant]]  # key -> shape of the input -> choice

# Files ----------------------------------------------------------------------------------------------------------


def directory() -> Path:
    """Where choices are kept between processes: beside the verdicts of the self-check."""
    return memory.cache_dir().parent / "plans"


@functools.cache
def build_identity() -> str:
    """A hash of the package's sources and of how its kernels were built."""
    digest = hashlib.sha256(json.dumps(library.status().build_info, sort_keys=True).encode())
    builds = [f"{b.name} {op} {kernel.build}" for b in backends().values() for op, kernel in b.kernels.items()]
    digest.update("\n".join(builds).encode())
    root = Path(__file__).parents[1]
    for file in sorted(file for name in SOURCES for file in (root / name).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """The device in words, with the CPU's model: what a time holds for."""
    return memory.device_name(device) + (f" {devices.cpu_name()}" if device.type == "cpu" else "")


def identity(device: torch.device) -> dict[str, str]:
    """Everything that all choices in a file depend on."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": library.status().triton,
        "build": build_identity(),
    }


def file_of(device: torch.device) -> Path:
    """The file of choices for `device`."""
    digest = hashlib.sha256(json.dumps(identity(device), sort_keys=True).encode()).hexdigest()[:16]
    return directory() / f"{device.type}-{digest}.json"


def _read(device: torch.device) -> list[dict]:
    """The rows on disk; none where there is no such file, or it is not one of ours."""
    try:
        kept = json.loads(file_of(device).read_text())
        if kept["key"] != identity(device):
            return []
        return [row for row in kept["rows"] if _parse(row) is not None]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _parse(row: dict) -> tuple[str, Shape, Variant] | None:
    """Key, shape and choice of a row; None if it is not one."""
    try:
        key, shape, choice = row["chain"], tuple(row["shape"]), Variant(**row["choice"])
    except (TypeError, KeyError):
        return None
    sound = isinstance(key, str) and len(shape) == 4 and all(type(n) is int for n in shape)
    return (key, shape, choice) if sound and all(type(flag) is bool for flag in choice) else None


def store(device: torch.device, rows: list[dict]) -> None:
    """Use `rows` from now on, and put them into the file, where they replace those of the same key and shape.

    A row: ``{"chain": key, "shape": [n, c, h, w], "choice": {"gram": true, ...}}``, and what else a reader may like.

    Raises:
        OSError: they cannot be kept on disk; they hold in this process all the same.
    """
    kept = {(row["chain"], tuple(row["shape"])): row for row in (*_read(device), *rows)}
    _enter(load(device), rows)
    _Seen.changes += 1
    disk.write_json(file_of(device), {"key": identity(device), "rows": [*kept.values()]})


# Asking ---------------------------------------------------------------------------------------------------------

_tables: dict[tuple[str, int], Rows] = {}  # by device type and index


class _Seen:
    changes = 0


def changes() -> int:
    """How often what may be recalled has changed: for whoever keeps an answer."""
    return _Seen.changes


def forget() -> None:
    """Drop what this process remembers; the files stay."""
    _Seen.changes += 1
    _tables.clear()


def _place(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


def _enter(table: Rows, rows: list[dict]) -> Rows:
    for key, shape, choice in filter(None, map(_parse, rows)):
        table.setdefault(key, {})[shape] = choice
    return table


def load(device: torch.device) -> Rows:
    """The choices for `device`, read from disk if this process has not done so yet. Never raises."""
    place = _place(device)
    threads()  # for the graphs that may be traced next
    if place not in _tables:
        rows = []
        with contextlib.suppress(Exception):  # whatever is odd about this machine, no step may fail for a short-cut
            rows = _read(device) if directory().is_dir() else []  # the usual case needs no hash of the sources
        _tables[place] = _enter({}, rows)
    return _tables[place]


def recall(call: Call, allowed: Callable[[Call], list[Variant]]) -> Variant | None:
    """The variant that was measured to be the fastest for this call; None: it was not measured, or is not `allowed`."""
    x, rows = call.x, None
    if torch.compiler.is_compiling():
        rows = _tables.get(_place(x.device))
    elif type(x) in (Tensor, torch.nn.Parameter):  # not a fake tensor, nor one that stands for something else
        rows = load(x.device)
    for shape, choice in rows.get(key_of(call), {}).items() if rows else ():
        if all(have == want for have, want in zip(x.shape, shape, strict=True)):  # graphs of symbolic sizes guard on it
            return choice if choice in allowed(call) else None  # a file may say anything
    return None
