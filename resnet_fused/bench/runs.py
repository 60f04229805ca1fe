"""Recorded runs: one file for every machine, one line for every run, only ever added to.

``FOLDER/MACHINE/runs.jsonl`` holds JSON objects with ``schema``, ``kind`` and ``provenance``. Those of kind "bench" are
a :class:`~.records.Report`; any other kind is the name of a script, and ``text`` what it printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator

import torch

from . import records
from .records import Report

FILE = "runs.jsonl"
BENCH = "bench"
#: What AMD's families are called: a virtual machine may name none but "AMD EPYC".
GENERATIONS = {"26": "zen5"}
CPU = re.compile(r"(?P<name>.+?)( \(family (?P<family>\S+), model \S+\))?, (?P<cores>\d+) cores, (?P<capability>.+)")
#: What a processor's name has besides the name.
NOISE = re.compile(r"\((r|tm)\)|\b(amd|intel|cpu|processor|\d+-core)\b|@.*")


@dataclasses.dataclass(frozen=True)
class Run:
    """A line of a machine's file."""

    machine: str
    number: int  # of the line, from 1: it stays what it is
    kind: str
    provenance: dict[str, str]
    result: Report | str  # of kind "bench", or of another

    @property
    def place(self) -> str:
        """Where it stands in the folder of results, as documents quote it."""
        return f"{self.machine}/{FILE}:{self.number}"

    def markdown(self) -> str:
        """Everything that people want to read of it."""
        if isinstance(self.result, Report):
            return self.result.markdown()
        return f"{self.result}\n\n{records.provenance_line(self.provenance)}"


def machine_of(provenance: dict[str, str]) -> str:
    """What a machine's folder is called: processor, its generation or else its instruction set, and cores; or the GPU.

    "AMD EPYC (family 26, model 2), 2 cores, AVX512" is ``epyc-zen5-2core``.
    """
    device = provenance["device"]
    cpu = CPU.fullmatch(device)
    if cpu is None:
        return slug(device)
    name = NOISE.sub(" ", cpu["name"].lower())
    kind = GENERATIONS.get(cpu["family"], cpu["capability"])
    return slug(f"{name} {kind} {cpu['cores']}core")


def slug(text: str) -> str:
    """`text` as a name of a folder."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def record(folder: pathlib.Path, result: Report | str, kind: str = BENCH, provenance: dict | None = None) -> str:
    """Append a run to its machine's file in `folder`; returns its machine.

    A report has its `provenance` with it, a text has not. The line is one write to a file that is open for appending,
    so runs that end at the same time do not mix theirs.
    """
    if isinstance(result, Report):
        found = {"kind": kind} | result.document()
    else:
        found = {"kind": kind, "schema": records.SCHEMA, "provenance": provenance, "text": result}
    line = (json.dumps(found) + "\n").encode()
    machine = machine_of(found["provenance"])
    path = folder / machine / FILE
    path.parent.mkdir(exist_ok=True)
    with path.open("ab", buffering=0) as file:
        written = file.write(line)
    if written != len(line):
        raise OSError(f"{path}: {written} of {len(line)} bytes were written; remove that last line")
    return machine


def machines(folder: pathlib.Path) -> list[str]:
    """The machines of which `folder` has runs."""
    return sorted(path.parent.name for path in folder.glob(f"*/{FILE}"))


def read(folder: pathlib.Path, machine: str | None = None) -> list[Run]:
    """The runs of one machine in the order in which they were recorded, or of all machines, one after the other.

    Raises:
        ValueError: there is no such machine, or a line is not what this version writes; the text names it.
    """
    if machine is None:
        return [run for name in machines(folder) for run in read(folder, name)]
    path = folder / machine / FILE
    if not path.is_file():
        raise ValueError(f"no runs of {machine!r}; there are runs of {', '.join(machines(folder)) or 'no machine'}")
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found = json.loads(line)
            kind, provenance = found["kind"], found["provenance"]
            result = Report.from_document(found) if kind == BENCH else text_of(found)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        runs.append(Run(machine, number, kind, provenance, result))
    return runs


def text_of(found: dict) -> str:
    """What the script printed that wrote this line."""
    records.check_schema(found)
    return found["text"]


def results_folder(text: str) -> pathlib.Path:
    """For argparse: a folder of results that can be written to, since a run takes minutes before it is needed."""
    path = pathlib.Path(text)
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder that can be written to; pass benchmarks/results")
    return path


def add_option(parser: argparse.ArgumentParser) -> None:
    """``--record FOLDER``."""
    about = "add the run to this machine's file in FOLDER, e.g. benchmarks/results"
    parser.add_argument("--record", type=results_folder, metavar="FOLDER", help=about)


class _Kept(io.StringIO):
    """Passes on what is written, and keeps it."""

    def __init__(self, out) -> None:
        super().__init__()
        self.out = out

    def write(self, text: str) -> int:
        self.out.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.out.flush()


@contextlib.contextmanager
def printing(kind: str, into: pathlib.Path | None, **settings: object) -> Iterator[None]:
    """What is printed inside is a run: its provenance is printed behind it, and it is recorded `into` a folder.

    Not if it raises: then there is no result.
    """
    provenance = records.provenance(torch.device("cpu"), **settings, command=records.command())
    kept = _Kept(sys.stdout)
    with contextlib.redirect_stdout(kept):
        yield
    print(f"\n{records.provenance_line(provenance)}", flush=True)
    if into:
        record(into, kept.getvalue().strip(), kind, provenance)
