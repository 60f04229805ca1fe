"""Rows as they are measured, one JSON object a line, and the document made of them.

A line is one ``write`` to a file opened for appending and is on the disk before the next begins: the part's process and
the one that watches it write to the same file, and a process that is killed loses at most the line it was at.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

SCHEMA = "gpu-report 1"


class Stream:
    """A file that grows by whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, **fields: object) -> None:
        """Append one line. A figure that is not finite becomes null: JSON has no other word for it."""
        text = json.dumps(finite({"kind": kind} | fields), default=str) + "\n"
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            end = os.fstat(file).st_size
            torn = end and os.pread(file, 1, end - 1) != b"\n"  # the process before was killed within a line
            os.write(file, (("\n" if torn else "") + text).encode())
            os.fsync(file)
        finally:
            os.close(file)

    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def read(self) -> list[dict]:
        """All lines that are whole."""
        lines = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # torn by a kill
        return [line for line in lines if isinstance(line, dict) and "kind" in line]


def finite(value):
    """`value` with NaN and infinities as None, in nested containers."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclasses.dataclass
class Document:
    """Everything one command found."""

    provenance: dict  # machine, versions, revision, settings
    parts: list[dict]  # name, status, seconds, limit, clocks, reason
    rows: list[dict]  # each with part, item, status, and what was measured
    tuned: list[dict]  # configurations that a sweep found faster, as keys and values of the table of tuned ones
    complete: bool  # false where the command was interrupted

    @classmethod
    def of_lines(cls, lines: list[dict], complete: bool) -> Document:
        """The document of a stream's lines."""
        provenance: dict = {}
        clocks: dict[str, list] = {}
        for line in lines:
            if line["kind"] == "provenance":
                provenance = line["found"] | provenance  # the first word stands
            elif line["kind"] == "clocks":
                clocks.setdefault(line["part"], []).append(line["found"])
        parts = [without_kind(line) for line in lines if line["kind"] == "part"]
        for part in parts:
            part["clocks"] = clocks.get(part["name"], [])
        rows = [without_kind(line) for line in lines if line["kind"] == "row"]
        tuned = [without_kind(line) for line in lines if line["kind"] == "tuned"]
        return cls(provenance, parts, rows, tuned, complete)

    @classmethod
    def from_file(cls, path: Path) -> Document:
        """Of a finished report, or of the stream (.jsonl) that a killed command left.

        Raises:
            ValueError: the file is something else.
        """
        if path.suffix == ".jsonl":
            return cls.of_lines(Stream(path).read(), complete=False)
        data = json.loads(path.read_text())
        if data.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path.name} is no report of schema {SCHEMA!r}; pass a file that gpu-report wrote")
        return cls(**data)

    def to_json(self) -> str:
        """One JSON document, a row a line."""
        rows = ",\n".join("  " + json.dumps(row) for row in self.rows)
        rest = {key: value for key, value in dataclasses.asdict(self).items() if key != "rows"}
        head = json.dumps({"schema": SCHEMA} | rest, indent=1)
        return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'

    def failures(self) -> list[dict]:
        """Rows in which a kernel's values were wrong, or a check died."""
        return [row for row in self.rows if row["status"] == "failed" or (row["status"] == "died" and row["checks"])]


def without_kind(line: dict) -> dict:
    """A line's own fields."""
    return {key: value for key, value in line.items() if key != "kind"}


def write_whole(path: Path, text: str) -> None:
    """Replace `path` in one step: whoever reads it finds the old document or the new one."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)
