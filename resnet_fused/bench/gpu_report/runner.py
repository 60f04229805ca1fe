"""Run the parts one after the other, each in a process group of its own that ends when its time is up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..progress import Bar
from .context import Settings
from .parts import Part
from .stream import Document, Stream, write_whole

#: Of a part's limit: the part begins no new item after it, so that it ends by itself.
OWN_SHARE = 0.85
#: A process needs about as long to import torch and to find the GPU.
LEAST_SECONDS = 4.0
#: What a part gets however short the report is, as long as there is time at all.
FAIR_SECONDS = 15.0
MOST_RESTARTS = 5
TAIL = 2000  # characters of what a process said before it died
POLL_SECONDS = 0.2


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C."""


@dataclasses.dataclass
class Ended:
    """How a part's process ended."""

    code: int
    seconds: float
    killed: str = ""  # why it was, if it was
    late: bool = False  # whether only because the part's time was up
    said: str = ""


def run(
    parts: Sequence[Part], settings: Settings, seconds: float, out: Path, now: Callable[[], float] = time.monotonic
) -> Document:
    """Run `parts` within `seconds` and write the document to `out`, after every part and whatever happens.

    Ctrl-C and SIGTERM end the part at work; its rows stay, the document says that it is not complete, and
    KeyboardInterrupt is raised after it is written.
    """
    stream = Stream(out.with_suffix(".rows.jsonl"))
    stream.path.unlink(missing_ok=True)
    ends, complete = now() + seconds, False
    with terminable(), Bar({part.name: part.share * seconds for part in parts}) as bar:
        try:
            for index, part in enumerate(parts):
                left = ends - now()
                share = left * part.share / sum(later.share for later in parts[index:])
                limit = min(left, max(share, FAIR_SECONDS))
                with bar.part(part.name) as progress:
                    run_part(part, settings, stream, limit, progress)
                write_whole(out, Document.of_lines(stream.read(), complete=False).to_json())
            complete = True
        finally:
            reached = {line["name"] for line in stream.read() if line["kind"] == "part"}
            for part in parts:
                if part.name not in reached:
                    stream.write("part", name=part.name, status="not run", seconds=0.0, reason="interrupted before")
            document = Document.of_lines(stream.read(), complete)
            write_whole(out, document.to_json())
            stream.path.unlink(missing_ok=True)
    return document


def run_part(part: Part, settings: Settings, stream: Stream, limit: float, progress: Callable[[float], None]) -> None:
    """Run one part; where an item ends its process, once more without the items that were begun."""
    started, why, tries = time.monotonic(), "", 0
    status = "not run"
    try:
        while (left := limit - (time.monotonic() - started)) >= LEAST_SECONDS and tries <= MOST_RESTARTS:
            begun = items(stream, part, "begin")
            ended = run_once(part, settings, stream, begun, left, lambda f: progress(1 - (1 - f) * left / limit))
            tries += 1
            if ended.code == 0:
                status = "done"
                break
            status, why = "cut off" if ended.late else "died", ended.killed or f"exit code {exit_text(ended.code)}"
            current, more = at_work(stream, part, begun), len(items(stream, part, "begin")) > len(begun)
            facts = {"part": part.name, "status": status, "checks": part.checks and bool(current or not more)}
            item = current or ("(between items)" if more else "(before its first item)")
            stream.write("row", item=item, reason=why, said=ended.said, **facts)
            if not more:
                break  # nothing that could be left out
        else:
            why = why or "no time left"
    except KeyboardInterrupt:
        status, why = "interrupted", "ended by the user"
        raise
    finally:
        seconds = round(time.monotonic() - started, 1)
        facts = {"limit": round(limit, 1), "tries": tries, "reason": why if status != "done" or tries > 1 else ""}
        stream.write("part", name=part.name, status=status, seconds=seconds, **facts)


def items(stream: Stream, part: Part, kind: str) -> list[str]:
    """The items of `part` that a process has begun ("begin"), or is done with ("end")."""
    return [line["item"] for line in stream.read() if line["kind"] == kind and line["part"] == part.name]


def at_work(stream: Stream, part: Part, before: list[str]) -> str:
    """The item that the part's process is at; empty between items. `before`: begun by an earlier process."""
    over = {*before, *items(stream, part, "end")}
    return next((item for item in items(stream, part, "begin") if item not in over), "")


def run_once(
    part: Part, settings: Settings, stream: Stream, skip: list[str], limit: float, progress: Callable[[float], None]
) -> Ended:
    """One process of a part, watched until it ends or its time is up."""
    asked = {"part": part.name, "module": part.module, "checks": part.checks, "skip": skip, "stream": str(stream.path)}
    asked["parent"] = os.getpid()
    asked |= {"settings": dataclasses.asdict(settings), "ends": time.time() + OWN_SHARE * limit}
    command = [sys.executable, "-m", f"{__package__}.child", json.dumps(asked)]
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, close_fds=True
        )
        try:
            killed, late = watch(process, part, stream, skip, limit, progress)
        finally:
            end_group(process)
        said.seek(max(0, said.seek(0, os.SEEK_END) - TAIL))
        text = said.read().decode(errors="replace")
    seconds = time.monotonic() - started
    return Ended(process.returncode, seconds, killed, late, text if process.returncode else "")


def watch(process, part: Part, stream: Stream, skip: list[str], limit: float, progress) -> tuple[str, bool]:
    """Wait for `process`; returns why it must be ended, empty if it ended by itself, and whether its time was up."""
    started = time.monotonic()
    item, since, size = "", started, -1
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        at = time.monotonic()
        if size != (size := stream.size()) and item != (item := at_work(stream, part, skip)):
            since = at
        if at - started > limit:
            return f"killed at the part's limit of {limit:.0f} s", True
        if item and at - since > part.item_seconds:
            return f"killed: its item took more than {part.item_seconds:.0f} s", False
        progress(min(1.0, (at - started) / limit))
    return "", False


def end_group(process) -> None:
    """Kill what is left of a process and of all that it started in its group, compilers for one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def exit_text(code: int) -> str:
    """An exit code, with the signal's name."""
    try:
        return f"{code} ({signal.Signals(-code).name})" if code < 0 else str(code)
    except ValueError:
        return str(code)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` in the main thread within the block."""

    def terminate(number, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
