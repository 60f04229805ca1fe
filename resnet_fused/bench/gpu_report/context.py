"""What a part is given: what to measure, how long it may take, and where its rows go."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from .stream import Stream

MODELS = ("resnet50", "resnet18", "resnext50_32x4d", "wide_resnet50_2")
#: Images in a batch of training, by the least GiB of memory that it needs.
BATCHES = {60: 256, 20: 128, 10: 64, 0: 16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for, with every default decided; goes to the parts' processes as JSON."""

    device: str
    models: tuple[str, ...] = MODELS
    batch: int = 2
    size: int = 64
    quick: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: what a GPU trains in, and on a CPU what it is quick in."""
        return torch.bfloat16 if torch.device(self.device).type == "cuda" else torch.float32


def batch_for(device: torch.device) -> int:
    """The largest batch of :data:`BATCHES` for a GPU's memory."""
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return next(batch for least, batch in BATCHES.items() if memory >= least)


class Context:
    """One part at work."""

    def __init__(self, part: str, settings: Settings, stream: Stream, seconds: float, checks: bool = False) -> None:
        self.part, self.settings, self.stream, self.checks = part, settings, stream, checks
        self.device = torch.device(settings.device)
        self.item = ""
        self.ends = time.monotonic() + seconds
        self.device_facts: dict = {}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until this part should end by itself."""
        return self.ends - time.monotonic()

    def row(self, status: str = "measured", **fields: object) -> None:
        """Write a row of the item at work.

        `status`: "measured", "passed", "failed" (wrong values), "skipped" or "error", the last two with a `reason`.
        """
        where = {"part": self.part, "item": self.item, "status": status, "checks": self.checks}
        self.stream.write("row", **where, **self.device_facts, **fields)

    def skip(self, reason: str, **fields: object) -> None:
        """A row that says why there is none."""
        self.row("skipped", reason=reason, **fields)

    def attempt(self, measure: Callable[[], None], **fields: object) -> bool:
        """Run `measure`; an exception of a peer or of a configuration becomes a row with `fields`, and False."""
        try:
            measure()
        except Exception as error:
            self.row("error", reason=reason_of(error), **fields)
            alive(self.device)
            return False
        return True


def reason_of(error: Exception) -> str:
    """An exception in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"


class DeviceLost(RuntimeError):
    """The process's context of the device is broken: nothing more can be measured in it."""


def alive(device: torch.device) -> None:
    """Raise :class:`DeviceLost` where an earlier error took the device's context with it."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(reason_of(error)) from error
        torch.cuda.empty_cache()
