"""Interleaving and quantiles, on clocks that tick as the test says."""

import gc

import numpy
import pytest
import torch

from resnet_fused.bench import timing
from resnet_fused.bench.timing import HostClock, Rounds, Samples, interleave


class FakeTime:
    """A clock that stands still until told to go on."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def contender(time, trace, name, forward, backward):
    def run(lap):
        trace.append(name)
        time.seconds += forward
        lap("forward")
        time.seconds += backward
        lap("backward")

    return run


def test_interleaves_and_splits_laps():
    time, trace = FakeTime(), []
    runs = {"a": contender(time, trace, "a", 0.001, 0.002), "b": contender(time, trace, "b", 0.010, 0.020)}
    timed = interleave(runs, Rounds(at_least=3, warmup=1), HostClock(time), now=time)
    assert trace == ["b", "a", "a", "b"] * 2
    assert {lap: len(s) for lap, s in timed["a"].items()} == {"forward": 3, "backward": 3, "total": 3}
    assert timed["a"]["forward"].median == pytest.approx(1.0)
    assert timed["b"]["backward"].median == pytest.approx(20.0)
    assert timed["b"]["total"].median == pytest.approx(30.0)


def test_goes_on_while_the_budget_lasts_and_stops_at_most():
    time, trace, told = FakeTime(), [], []
    runs = {"a": contender(time, trace, "a", 0.5, 0.5)}
    timed = interleave(runs, Rounds(2, 50, budget_s=6.5, warmup=1), HostClock(time), told.append, now=time)
    assert len(timed["a"]["total"]) == 6  # the seventh second, warm-up included, is the last to begin
    assert told == sorted(told)
    assert told[-1] <= 1.0
    assert len(interleave(runs, Rounds(2, 4, budget_s=100.0), HostClock(time), now=time)["a"]["total"]) == 4


def test_quantiles_are_numpys():
    samples = Samples(numpy.array([5.0, 1.0, 2.0, 4.0, 3.0]))
    assert samples.median == 3.0
    assert samples.quantile(0.1) == pytest.approx(1.4)
    assert samples.quantile(0.9) == pytest.approx(4.6)


def test_interval_of_a_speedup():
    steady, noisy = Samples(numpy.full(9, 4.0)), Samples(numpy.array([1.8, 1.9, 2.0, 2.0, 2.0, 2.1, 2.2, 8.0, 9.0]))
    assert timing.speedup_interval(steady, steady) == (1.0, 1.0)
    low, high = timing.speedup_interval(steady, noisy)
    assert 1.8 < low <= 2.0 <= high <= 2.2
    assert timing.speedup_interval(steady, noisy) == (low, high)


def test_garbage_collection_is_off_while_timing_and_back_on_after():
    seen = []
    interleave({"a": lambda lap: (seen.append(gc.isenabled()), lap("x"))}, Rounds(2), HostClock())
    assert seen == [False] * 3
    assert gc.isenabled()
    with pytest.raises(RuntimeError), timing.no_garbage_collection():
        raise RuntimeError
    assert gc.isenabled()


def test_clock_follows_the_device():
    assert isinstance(timing.clock_for(torch.device("cpu")), timing.HostClock)
    assert isinstance(timing.clock_for(torch.device("cuda")), timing.CudaClock)
