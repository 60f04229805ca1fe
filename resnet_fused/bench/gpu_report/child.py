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

CLOCK_SECONDS = 5.0  # between two looks at the clocks, each of which takes a tenth of one
LOST = 3  # exit code: the device's context is broken, the next process may go on


class Clocks:
    """Clocks, power and temperature beside the rows: the card may slow down in the middle of a part."""

    def __init__(self, context: Context) -> None:
        self.context, self.last = context, float("-inf")
        self.sample()

    def sample(self, least: float = CLOCK_SECONDS) -> None:
        """Write what they are now, unless that was done less than `least` seconds ago."""
        if time.monotonic() - self.last >= least:
            self.last = time.monotonic()
            found = environment.clocks(self.context.device) | {"after": self.context.item}
            self.context.stream.write("clocks", part=self.context.part, found=found)


def work(context: Context, module: str, skip: set[str], wanted: Callable[[], bool] = lambda: True) -> None:
    """Run the items of a part one by one while there is time, and while the report is still `wanted`."""
    clocks = Clocks(context)
    for name, run in importlib.import_module(module).items(context):
        if name in skip:
            continue
        if not wanted():
            return
        context.item = name
        if context.left() <= 0:
            context.skip("no time left for this item and those after it")
            break
        context.stream.write("begin", part=context.part, item=name)
        try:
            run()
        except DeviceLost:
            raise
        except Exception as error:
            context.row("error", reason=reason_of(error))
            alive(context.device)
        context.stream.write("end", part=context.part, item=name)
        clocks.sample()
    clocks.sample(0.0)


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
        work(context, asked["module"], set(asked["skip"]), lambda: os.getppid() == asked["parent"])
    except DeviceLost as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
