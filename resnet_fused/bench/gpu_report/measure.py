"""Times of single calls: on a GPU replays of a graph over so many sets of inputs that the L2 cache serves none."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy
import torch

from ...plan import devices
from ..timing import Samples, clock_for, no_garbage_collection
from .context import Context

SETS_BEYOND_L2 = 4  # the inputs of all sets are so many times the cache
MOST_SETS = 32
COPY_BYTES = 1 << 30
SECONDS, QUICK_SECONDS = 0.25, 0.02
LEAST_SAMPLES, MOST_SAMPLES = 5, 200


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    samples: Samples
    how: str

    @property
    def median(self) -> float:
        return self.samples.median

    def row(self) -> dict[str, object]:
        """The fields of a row."""
        quantiles = {"q10": self.samples.quantile(0.1), "q90": self.samples.quantile(0.9)}
        return {"ms": self.median, **quantiles, "n": len(self.samples), "timed": self.how}


def time_calls(calls: Sequence[Callable[[], object]], device: torch.device, quick: bool) -> Timing:
    """Milliseconds of a call, on average over `calls`, which do the same on different inputs.

    On a GPU one graph holds them all, so that no gap between launches is measured; where they cannot be captured, they
    run one by one, and the row says so.
    """
    for call in calls:
        call()  # compiled, selected, allocated
    how, run = "one by one", lambda: [call() for call in calls]
    if device.type == "cuda":
        graph = captured(calls, device)
        if graph is not None:
            how, run = "replays of a graph", graph.replay
    clock, values = clock_for(device), []
    ends = time.monotonic() + (QUICK_SECONDS if quick else SECONDS)
    run()
    with no_garbage_collection():
        while len(values) < LEAST_SAMPLES or (time.monotonic() < ends and len(values) < MOST_SAMPLES):
            clock.start()
            run()
            clock.lap("call")
            values.append(clock.read()["call"] / len(calls))
    return Timing(Samples(numpy.array(values)), how)


def captured(calls: Sequence[Callable[[], object]], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """`calls` as one graph; None where something in them cannot be captured."""
    graph, results = torch.cuda.CUDAGraph(), []
    try:
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph):
            # all results live until the end: each call writes to memory of its own
            results += [call() for call in calls]
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph


def number_of_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs to rotate among."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    wanted = -(-SETS_BEYOND_L2 * max(devices.of(device).l2, 32 << 20) // max(1, bytes_of_one))
    return int(max(1, min(wanted, MOST_SETS, free // 4 // max(1, bytes_of_one))))


def copy_bandwidth(context: Context) -> tuple[float, int, Timing]:
    """Bytes a second of a large copy on the device, read and written both counted; those bytes; its times."""
    size = COPY_BYTES if context.on_gpu else 1 << 24
    if context.on_gpu:
        size = min(size, torch.cuda.mem_get_info(context.device)[0] // 8)
    source = torch.randn(size // 4, device=context.device)
    target = torch.empty_like(source)
    timing = time_calls([lambda: target.copy_(source)], context.device, context.settings.quick)
    if not torch.equal(source, target):
        raise RuntimeError("a copy on the device differs from what was copied")
    moved = 2 * source.nbytes
    return moved / (timing.median * 1e-3), moved, timing


def copy_row(context: Context) -> float:
    """Measure the copy, write its row, and return bytes a second."""
    bandwidth, moved, timing = copy_bandwidth(context)
    context.row(name="device copy", bytes=moved, gb_per_s=bandwidth / 1e9, **timing.row())
    return bandwidth
