"""Faults that show on some sizes alone, planted in the Triton kernels: the check before a first use must find each.

Not collected by itself: test_interpreter.py runs it in a process with TRITON_INTERPRET=1. The small cases of
:mod:`resnet_fused.backends.selfcheck.cases` pass with every one of them.
"""

import dataclasses

import pytest
import torch

from resnet_fused import backends
from resnet_fused.backends import dispatch
from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck import cases, draws, judge
from resnet_fused.backends.triton import conv1x1_wgrad

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def data(channels, size=10, samples=8):
    x = torch.zeros(samples, channels, size, size, dtype=BF16)
    return x.contiguous(memory_format=torch.channels_last)


def weight(outputs, inputs):
    return torch.zeros(outputs, inputs, 1, 1, dtype=BF16)


def last_split_dropped(run):
    """The second launch of a weight gradient forgets the last split."""

    def faulty(*args, **kwargs):
        merge = conv1x1_wgrad.merge
        conv1x1_wgrad.merge = lambda partial, results: merge(tuple(t[: max(1, len(t) - 1)] for t in partial), results)
        try:
            return run(*args, **kwargs)
        finally:
            conv1x1_wgrad.merge = merge

    return faulty


def off_diagonal_tile_wrong(run):
    """A Gram tile of columns from 128 on against the first ones."""

    def faulty(a, *args, **kwargs):
        gram, total = run(a, *args, **kwargs)
        gram[:128, 128:] *= 1.25
        return gram, total

    return faulty


def later_steps_dropped(run):
    """A product whose loop over channels ends after the first 64."""

    def faulty(x, weight, *args, **kwargs):
        weight = weight.clone(memory_format=torch.contiguous_format)
        weight[:, 64:] = 0
        return run(x, weight, *args, **kwargs)

    return faulty


def wide_tile_wrong(run):
    """A tile of 128 columns that writes its upper half a bit off."""

    def faulty(*args, **kwargs):
        grad, *sums = run(*args, **kwargs)
        if grad.shape[1] >= 128:
            grad[:, 64:128] *= 1.25
        return grad, *sums

    return faulty


FAULTS = {
    "splits": ("conv1x1_wgrad", last_split_dropped, lambda: ((data(32), data(48)), {})),
    "off-diagonal tiles": ("gram", off_diagonal_tile_wrong, lambda: ((data(160), torch.zeros(160)), {})),
    "several steps": ("conv1x1", later_steps_dropped, lambda: ((data(80), weight(16, 80)), {})),
    "a wide tile": ("conv1x1_dgrad", wide_tile_wrong, lambda: ((data(32), weight(32, 144)), {})),
}


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    judge.forget()
    yield
    judge.forget()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_some_sizes_is_found_before_its_first_use(fresh, monkeypatch, name):
    op, plant, call = FAULTS[name]
    args, kwargs = call()
    sound = room.BACKEND.kernels[op]
    broken = dataclasses.replace(sound, run=plant(sound.run), build="broken")
    backend = dataclasses.replace(room.BACKEND, kernels=room.BACKEND.kernels | {op: broken})
    monkeypatch.setattr(dispatch, "_backends", backends.backends() | {"triton": backend})
    rows = judge.check_kernel(backend, op, BF16, CPU)
    assert all(row.passed for row in rows), "the small cases would do"
    assert judge.objection(backend, op, BF16, CPU) == ""
    with pytest.warns(RuntimeWarning, match=f"switched off triton {op}") as caught:
        chosen = backends.choose(op, args, kwargs)
        again = backends.choose(op, args, kwargs)
    assert "raised" not in str(caught[0].message), caught[0].message
    assert chosen.name == again.name != "triton" and len(caught) == 1
    assert "configuration" in backends.objection("triton", op, BF16, CPU), "planners are not told"
    judge.forget()  # as in another process
    assert "configuration" in backends.objection("triton", op, BF16, CPU), "planners forget"
    with pytest.warns(RuntimeWarning, match="switched off"):
        assert backends.choose(op, args, kwargs).name != "triton"


@pytest.mark.parametrize("name", ["splits", "several steps"])
def test_without_the_fault_it_is_trusted_once_and_for_all(fresh, monkeypatch, name):
    op, _, call = FAULTS[name]
    args, kwargs = call()
    assert backends.choose(op, args, kwargs).name == "triton"
    monkeypatch.setattr(judge, "_meet", lambda *call: pytest.fail("judged again"))
    assert backends.choose(op, args, kwargs).name == "triton"


def test_a_fault_of_one_configuration_leaves_the_others(fresh, monkeypatch):
    sound = room.BACKEND.kernels["conv1x1_wgrad"]
    broken = dataclasses.replace(sound, run=last_split_dropped(sound.run), build="broken")
    backend = dataclasses.replace(room.BACKEND, kernels={"conv1x1_wgrad": broken})
    monkeypatch.setattr(dispatch, "_backends", backends.backends() | {"triton": backend})
    few = data(32, 5, 2), data(48, 5, 2)
    assert backends.choose("conv1x1_wgrad", few, {}).name == "triton"
    with pytest.warns(RuntimeWarning, match="switched off"):
        assert backends.choose("conv1x1_wgrad", (data(32), data(48)), {}).name != "triton"
    assert backends.choose("conv1x1_wgrad", few, {}).name == "triton"


def test_a_capture_passes_over_an_unjudged_configuration(fresh, monkeypatch):
    args = data(32, 5, 2), data(48, 5, 2)
    monkeypatch.setattr(judge, "_capturing", lambda device: True)
    with pytest.warns(RuntimeWarning, match="cannot be during a CUDA graph capture"):
        assert backends.choose("conv1x1_wgrad", args, {}).name != "triton"
    monkeypatch.setattr(judge, "_capturing", lambda device: False)
    assert backends.choose("conv1x1_wgrad", args, {}).name == "triton"
    monkeypatch.setattr(judge, "_capturing", lambda device: True)
    assert backends.choose("conv1x1_wgrad", args, {}).name == "triton", "forgot a verdict during a capture"


def test_a_verdict_on_disk_is_taken(fresh, monkeypatch):
    args = data(32, 5, 2), data(48, 5, 2)
    assert backends.choose("conv1x1_wgrad", args, {}).name == "triton"
    judge.forget()
    monkeypatch.setattr(judge, "check_call", lambda *call: pytest.fail("judged again"))
    assert backends.choose("conv1x1_wgrad", args, {}).name == "triton"


@pytest.mark.parametrize("op", sorted(set(room.OPS) - {"conv1x1_backward"}))
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_cases_made_of_a_small_call_pass(fresh, op, dtype):
    """Of the last small case's call: options that a step of a model may have."""
    dtype = dtype if dtype in room.BACKEND.kernels[op].dtypes else torch.float32
    case = cases.one(op, dtype)
    placed = draws.place(case, dtype, CPU)
    text, rows = judge.check_call(room.BACKEND, op, placed.args, placed.kwargs, CPU)
    assert text == "" and rows
