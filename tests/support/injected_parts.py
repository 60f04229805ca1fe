"""Small settings for tests of a GPU's report, and parts that misbehave, which `install` makes modules of."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import torch

from resnet_fused.bench.gpu_report import selfcheck
from resnet_fused.bench.gpu_report.context import Context, Settings
from resnet_fused.bench.gpu_report.parts import BY_NAME
from resnet_fused.bench.gpu_report.stream import Stream

TINY = Settings("cpu", models=("resnet18",), batch=2, size=32, quick=True)


@dataclasses.dataclass(frozen=True)
class Half:
    """Settings in the dtype of a GPU."""

    models: tuple = ("resnet50",)
    batch: int = 2
    size: int = 32
    device: str = "cpu"
    quick: bool = True
    dtype: torch.dtype = torch.bfloat16


def context_of(tmp_path, part, settings=TINY):
    return Context(part, settings, Stream(tmp_path / "rows.jsonl"), 300, BY_NAME[part].checks)


def rows_of(context):
    return [line for line in context.stream.read() if line["kind"] == "row"]


def row(context, number):
    return f"item {number}", lambda: context.row(name=f"row {number}", value=number)


def aborts(context):
    """A kernel that takes the process with it."""
    yield row(context, 1)
    yield "aborts", os.abort
    yield row(context, 2)


def hangs(context):
    """A kernel that never ends, in a process that has started another."""

    def hang():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        context.row(name="started", pid=child.pid)
        time.sleep(600)

    yield row(context, 1)
    yield "hangs", hang
    yield row(context, 2)


def raises(context):
    """A peer that is missing, and a kernel that is wrong."""

    def missing():
        raise AttributeError("no such op")

    yield "missing", missing
    yield "wrong", lambda: context.row("failed", name="kernel", reason="error 1, allowed 0.1")
    yield row(context, 1)


def slow(context):
    """More items than time."""
    for number in range(1000):
        yield f"item {number}", lambda number=number: (context.row(name="row", value=number), time.sleep(0.3))


def waits(context):
    """Until someone ends the command."""
    yield row(context, 1)
    yield "waits", lambda: time.sleep(600)


INTERPRETED = ("conv1x1", "conv1x1_join", "gram")


def interpreted(context):
    """Of the self-checks those of some kernels of Triton's."""
    wanted = {f"triton {op} float32" for op in INTERPRETED}
    yield from (item for item in selfcheck.items(context) if item[0] in wanted)


PARTS = (aborts, hangs, interpreted, raises, slow, waits)


def install(directory: pathlib.Path) -> None:
    """One importable module in `directory` for each part."""
    for part in PARTS:
        (directory / f"injected_{part.__name__}.py").write_text(
            f"from injected_parts import {part.__name__} as items\n"
        )
