"""Time contenders in turn, A B B A, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping

import numpy
import torch


@dataclasses.dataclass(frozen=True)
class Samples:
    """Durations of one thing in milliseconds."""

    values: numpy.ndarray

    @property
    def median(self) -> float:
        return float(numpy.median(self.values))

    def quantile(self, q: float) -> float:
        """The `q`-quantile, 0 <= q <= 1, linear between samples."""
        return float(numpy.quantile(self.values, q))

    def __len__(self) -> int:
        return len(self.values)


def speedup_interval(yardstick: Samples, other: Samples) -> tuple[float, float]:
    """The 90% confidence interval of ``yardstick.median / other.median``, by the bootstrap over rounds.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), percentile method; a round is drawn with all of its
    contenders. The same samples give the same interval.
    """
    from scipy import stats  # takes a second to import, for one figure in a run

    def ratio(a: numpy.ndarray, b: numpy.ndarray, axis: int) -> numpy.ndarray:
        return numpy.median(a, axis=axis) / numpy.median(b, axis=axis)

    found = stats.bootstrap(
        (yardstick.values, other.values), ratio, paired=True, vectorized=True, n_resamples=2000, method="percentile",
        confidence_level=0.9, rng=numpy.random.default_rng(0),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How often to measure: `warmup` rounds unmeasured, `at_least` measured, more while `budget_s` lasts."""

    at_least: int = 5
    at_most: int = 50
    budget_s: float = 0.0
    warmup: int = 1


class HostClock:
    """Durations between marks on the host's monotonic clock."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def start(self) -> None:
        self.marks = [("", self.now())]

    def lap(self, name: str) -> None:
        """End the lap `name`, which began at the mark before."""
        self.marks.append((name, self.now()))

    def read(self) -> dict[str, float]:
        """Milliseconds of every lap since :meth:`start`."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {name: 1e3 * (after - before) for (_, before), (name, after) in pairs}


class CudaClock:
    """Durations between CUDA events: time on the GPU, also when the host runs ahead of it."""

    def start(self) -> None:
        torch.cuda.synchronize()
        self.marks = []
        self.lap("")

    def lap(self, name: str) -> None:
        """End the lap `name`, which began at the mark before."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((name, event))

    def read(self) -> dict[str, float]:
        """Milliseconds of every lap since :meth:`start`; waits for the GPU."""
        torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {name: before.elapsed_time(after) for (_, before), (name, after) in pairs}


def clock_for(device: torch.device) -> HostClock | CudaClock:
    """The clock that tells the truth about work on `device`."""
    return CudaClock() if device.type == "cuda" else HostClock()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect once, then keep Python's cyclic collector out of the measurement."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def interleave(
    contenders: Mapping[str, Callable],
    rounds: Rounds,
    clock: HostClock | CudaClock,
    progress: Callable[[float], None] = lambda fraction: None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Samples]]:
    """Run the contenders in turn and return ``{contender: {lap: Samples}}``; the lap "total" is the sum of all.

    Args:
        contenders: name -> function of one argument, which it calls with a lap's name when that lap is over.
        rounds: how often; in each round every contender runs once, in every other one in reverse order.
        clock: measures the laps.
        progress: told the fraction done after each round.
        now: the clock of the time budget.
    """
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    started, done, order = now(), -rounds.warmup, list(contenders.items())
    with no_garbage_collection():
        while done < rounds.at_least or (done < rounds.at_most and now() - started < rounds.budget_s):
            for name, run in order if done % 2 == 0 else reversed(order):
                clock.start()
                run(clock.lap)
                if done >= 0:
                    laps[name].append(clock.read())
            done += 1
            used = (now() - started) / rounds.budget_s if rounds.budget_s else 1.0
            progress(min(1.0, used, (done + rounds.warmup) / (rounds.at_least + rounds.warmup)))
    return {name: summarise(samples) for name, samples in laps.items()}


def summarise(samples: list[dict[str, float]]) -> dict[str, Samples]:
    """``[{lap: ms}]`` of the rounds -> ``{lap: Samples}`` with "total", the sum over the laps of each round."""
    columns = {lap: [sample[lap] for sample in samples] for lap in samples[0]}
    columns["total"] = [sum(sample.values()) for sample in samples]
    return {lap: Samples(numpy.array(values)) for lap, values in columns.items()}
