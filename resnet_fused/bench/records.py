"""Measurements as rows, with where they come from: JSON to keep, markdown to paste."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys

import torch

from .. import __version__, library
from ..plan.devices import cpu_name

SCHEMA = 1
#: Environment variables that change how memory is allocated or how many threads run: part of every result.
ENVIRONMENT = (
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_INTERPRET",
)

LEGEND = (
    "Medians of interleaved runs with their 10% and 90% quantiles; speedups with the 90% interval of the ratio "
    "of medians (bootstrap). A training step is forward and backward, without an optimizer. MB: kept by autograd "
    "from forward to backward, each storage once, parameters not counted; or the peak above what was allocated before, "
    "where the line says so. In fresh processes: the median over processes of each one's median, with the smallest and "
    "the largest; speedups with the smallest and the largest of pairs."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantity of one peer."""

    name: str  # what was measured, the same for all peers
    unit: str  # "ms" or "MB"
    peer: str
    median: float
    q10: float
    q90: float
    n: int  # samples
    ratio: float  # stock's median / this median: above 1 is better than stock
    ratio_low: float | None = None  # 90% confidence interval of the ratio, of times
    ratio_high: float | None = None


def rows_of(
    name: str,
    unit: str,
    measured: dict[str, tuple[float, float, float, int]],
    intervals: dict[str, tuple[float, float]] | None = None,
) -> list[Row]:
    """Rows of one measurement: ``{peer: (median, q10, q90, n)}``; the first peer is the yardstick.

    `intervals`: of the ratios to it.
    """
    stock = next(iter(measured.values()))[0]
    return [
        Row(
            name,
            unit,
            peer,
            median,
            q10,
            q90,
            n,
            stock / median if median else float("nan"),
            *(intervals or {}).get(peer, ()),
        )
        for peer, (median, q10, q90, n) in measured.items()
    ]


@dataclasses.dataclass
class Report:
    """Everything one run found."""

    provenance: dict[str, str]
    rows: list[Row] = dataclasses.field(default_factory=list)
    equality: list[dict] = dataclasses.field(default_factory=list)

    def document(self) -> dict:
        """The report as what JSON can hold: schema, provenance, rows, equality."""
        return {"schema": SCHEMA} | dataclasses.asdict(self)

    def to_json(self) -> str:
        """The report as one JSON document."""
        return json.dumps(self.document(), indent=1) + "\n"

    @classmethod
    def from_document(cls, data: dict) -> Report:
        """Inverse of :meth:`document`.

        Raises:
            ValueError: the document has another schema number.
        """
        check_schema(data)
        return cls(data["provenance"], [Row(**row) for row in data["rows"]], data["equality"])

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of :meth:`to_json`."""
        return cls.from_document(json.loads(text))

    def markdown(self) -> str:
        """One table with a line per measurement and a column per peer, then a line that says where it is from."""
        return f"{markdown_table(self.rows)}\n\n{LEGEND}\n\n{provenance_line(self.provenance)}"


def check_schema(data: dict) -> None:
    """Refuse what another version wrote."""
    if data.get("schema") != SCHEMA:
        raise ValueError(f"this is a report of schema {data.get('schema')}; this version reads {SCHEMA}")


def markdown_table(rows: list[Row]) -> str:
    """Pivot rows: time per peer with its 10-90% range, the speedups over the first peer, and megabytes."""
    peers = list(dict.fromkeys(row.peer for row in rows))
    by_key = {(row.name, row.unit, row.peer): row for row in rows}
    others = peers[1:]
    header = ["measurement", *(f"{p} ms (q10-q90)" for p in peers), *(f"{p} speedup" for p in others)]
    counted = [peer for peer in peers if peer in peers[:2] or any(key[1:] == ("MB", peer) for key in by_key)]
    header += [f"MB {' / '.join(counted)}"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name in dict.fromkeys(row.name for row in rows):
        times = [by_key.get((name, "ms", peer)) for peer in peers]
        saved = [by_key.get((name, "MB", peer)) for peer in counted]
        cells = [name, *(time_cell(row) for row in times)]
        cells += [speedup_cell(row) for row in times[1:]]
        cells += [saved_cell(saved)]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time_cell(row: Row | None) -> str:
    """Three significant digits are all that a timing carries."""
    return f"{short(row.median)} ({short(row.q10)}-{short(row.q90)})" if row else ""


def speedup_cell(row: Row | None) -> str:
    """The ratio to the first peer, and how well it is known."""
    if row is None:
        return ""
    known = "" if row.ratio_low is None else f" ({row.ratio_low:.2f}-{row.ratio_high:.2f})"
    return f"{row.ratio:.2f}x{known}"


def saved_cell(saved: list[Row | None]) -> str:
    """Stock's and ours, and ours as a part of stock's; where asked for, what else of ours was counted."""
    found = [row for row in saved if row is not None]
    if None in saved[:2]:
        return ""
    stock, *ours = found
    part = " = " + " / ".join(f"{row.median / stock.median:.2f}" for row in ours) if stock.median else ""
    return " / ".join(short(row.median) for row in found) + part


def short(value: float) -> str:
    """`value` with three significant digits, without an exponent."""
    for limit, digits in ((100, 0), (10, 1), (1, 2)):
        if abs(value) >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.3f}"


def provenance(device: torch.device, **settings: object) -> dict[str, str]:
    """Where results come from: machine, versions, revision, allocator, date, and the `settings` of the run."""
    status = library.status()
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": status.triton or "none",
        "resnet_fused": __version__,
        "git": git_revision(),
        "compiled": status.build_info.get("compiler", "no") if status.cpu.loaded else "no",
        "environment": " ".join(allocator_environment()) or "default",
    }
    return found | {key: str(value) for key, value in settings.items()}


def provenance_line(found: dict[str, str]) -> str:
    """All of a provenance in one line."""
    return "; ".join(f"{key} {value}" for key, value in found.items())


def command() -> str:
    """What was typed. Of absolute paths the last part: the others say how a machine is laid out, and no more."""
    words = (re.sub(r"(^|=)/.*/", r"\1", word) for word in sys.orig_argv[1:])
    return shlex.join(["python", *words])


def allocator_environment() -> list[str]:
    """``NAME=value`` for every set variable that changes allocation or threading."""
    names = [*ENVIRONMENT, *sorted(name for name in os.environ if name.startswith("MALLOC_"))]
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's own name, with the instruction set that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def busy() -> str:
    """A warning if the machine has other work to do; empty if not."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load <= 0.5 * cores:
        return ""
    return f"the machine is busy (load {load:.1f} on {cores} cores): times will be long, wide, and of little use"


@functools.cache
def git_revision() -> str:
    """Revision of the checkout this package runs from; for an installed package the one it was built from."""
    root = pathlib.Path(__file__).parents[2]
    if (root / ".git").exists():  # not just any repository around it, such as one that holds a virtual environment
        try:
            return revision_of(root)
        except (OSError, subprocess.SubprocessError):
            pass  # no git, or a checkout of another user: the build knows its revision too
    return library.status().build_info.get("git", "unknown")


def revision_of(root: pathlib.Path) -> str:
    """Revision of a checkout, "-dirty" if its files are changed; not for results, to which the run before has added."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("describe", "--always") + ("-dirty" if changed else "")
