"""The process of one part: ``python -m resnet_fused.bench.gpu_report.child JSON``. Started by :mod:`.runner` only."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from . import environment
from .context import Context, DeviceLost, Settings, alive, reason_of
from .stream import Stream

LOST = 3  # exit code: the device's context is broken, the next process may go on


def work(context: Context, module: str, skip: set[str], wanted: Callable[[], bool] = lambda: True) -> None:
    """Run the items of a part one by one while there is time, and while the report is still `wanted`."""
    late = []
    for name, run in importlib.import_module(module).items(context):
        if name in skip:
            continue
        if not wanted():
            return
        if context.left() <= 0:
            late.append(name)
            continue
        context.item = name
        context.stream.write("begin", part=context.part, item=name)
        try:
            run()
        except DeviceLost:
            raise
        except Exception as error:
            context.row("error", reason=reason_of(error))
            alive(context.device)
        context.stream.write("end", part=context.part, item=name)
    if late:
        context.item = late[0]
        context.skip(f"no time left for {len(late)} items", items=late)


def main(text: str) -> int:
    """Run the part that `text` describes; returns the exit code."""
    asked = json.loads(text)
    settings = Settings(**asked["settings"] | {"models": tuple(asked["settings"]["models"])})
    context = Context(
        asked["part"], settings, Stream(Path(asked["stream"])), asked["ends"] - time.time(), asked["checks"]
    )
    warnings.simplefilter("ignore")  # rows say what is left out
    torch.manual_seed(0)
    try:
        context.device_facts = environment.device_facts(context.device)
        context.stream.write("provenance", part=context.part, found=environment.provenance(context))
        context.stream.write("clocks", part=context.part, found=environment.clocks(context.device))
        work(context, asked["module"], set(asked["skip"]), lambda: os.getppid() == asked["parent"])
        context.stream.write("clocks", part=context.part, found=environment.clocks(context.device))
    except DeviceLost as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
