"""Plans of calls: the same launches and results as the op's host code, which runs no more."""

import importlib

import pytest
import smallest
import torch

from resnet_fused import backends
from resnet_fused.backends import cards, dispatch
from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck import cases, draws, judge
from resnet_fused.backends.triton import common, configs, plans

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("full_float32")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(judge, "doubt", lambda *call: "")
    dispatch.forget()


def placed(op):
    """The smallest of the cases that start what the last one starts, with as many arguments."""
    dtype = room.BACKEND.kernels[op].dtypes[0]
    made = [draws.place(case, dtype, CPU) for case in cases.cases(op, dtype)]

    def starts(case):
        launches = room.kernels()[op].launches(case.args, case.kwargs, cards.H100)
        return [(launch.kernel.fn.__name__, *launch.values) for launch in launches], smallest.given(case)

    wanted = starts(made[-1])
    return min((case for case in made if starts(case) == wanted), key=smallest.elements)


def started(monkeypatch, run):
    """What `run` returns, and the kernels, programs and sizes that it started."""
    found, start = [], common.start

    def note(kernel, programs, *args, bound=None, **meta):
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
        found.append((kernel.fn.__name__, programs, shapes, meta.get("BLOCK_C"), meta.get("warps", common.NUM_WARPS)))
        start(kernel, programs, *args, **meta)

    with monkeypatch.context() as patch:
        patch.setattr(common, "start", note)
        return run(), found


def host(op):
    return importlib.import_module(f"{room.__name__}.{op}").run


@pytest.mark.parametrize("op", sorted(set(room.OPS) - {"running_update"}))
def test_a_plan_does_what_the_host_code_does(op, monkeypatch):
    case = placed(op)
    expected, wanted = started(monkeypatch, lambda: host(op)(*case.args, **case.kwargs))
    plan = plans.of_call(host(op), lambda: common.start, case.args, case.kwargs)
    assert plan is not None, "it does more than allocate and start"
    for _ in range(2):
        got, found = started(monkeypatch, lambda: plan((*case.args, *case.kwargs.values())))
        assert found == wanted
        pairs = list(zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, expected)), strict=True))
        assert all((a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) for a, b in pairs)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def test_running_statistics_move_by_a_plan_as_by_host_code(monkeypatch):
    one, other = placed("running_update"), placed("running_update")
    plan = plans.of_call(host("running_update"), lambda: common.start, one.args, {})
    assert plan(one.args) is None
    host("running_update")(*other.args)
    assert all(torch.equal(a, b) for a, b in zip(one.args, other.args, strict=True) if isinstance(a, torch.Tensor))


def test_a_start_that_tests_replace_sees_every_launch(monkeypatch):
    """Also where it was replaced before the first call, from which the plan is made."""
    case, seen = placed("bn_stats"), []
    monkeypatch.setattr(common, "start", lambda kernel, *args, **meta: seen.append(kernel.fn.__name__))
    for _ in range(2):
        backends.run("bn_stats", *case.args, **case.kwargs, backend="triton")
    assert seen == ["bn_stats_kernel", "bn_stats_merge_kernel"] * 2


def test_results_of_two_calls_share_no_memory():
    case = placed("bn_stats")
    first, second = (backends.run("bn_stats", *case.args, **case.kwargs, backend="triton") for _ in range(2))
    assert not {t.data_ptr() for t in first if t.numel()} & {t.data_ptr() for t in second if t.numel()}


def test_host_code_runs_once_for_calls_of_a_form(monkeypatch):
    kernel, calls = room.BACKEND.kernels["bn_stats"], []
    prepare = lambda args, kwargs: calls.append(args) or kernel.prepare(args, kwargs)  # noqa: E731
    monkeypatch.setitem(room.BACKEND.kernels, "bn_stats", type(kernel)(**{**vars(kernel), "prepare": prepare}))
    case = placed("bn_stats")
    for _ in range(3):
        backends.run("bn_stats", *case.args, **case.kwargs, backend="triton")
    assert len(calls) == 1


@pytest.mark.parametrize("what", ["strided parameters", "an empty batch"])
def test_host_code_that_does_more_has_no_plan_and_runs_every_time(what):
    z, gamma = torch.rand(2, 8, 3, 3).contiguous(memory_format=torch.channels_last), torch.rand(16)[::2]
    arguments = (z, gamma, gamma, 1e-3) if what == "strided parameters" else (z[:0], None, None, 1e-3)
    assert plans.of_call(host("bn_stats"), lambda: common.start, arguments, {}) is None
    expected = backends.run("bn_stats", *arguments, backend="reference")
    for _ in range(2):
        got = backends.run("bn_stats", *arguments, backend="triton")
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_errors_are_those_of_the_host_code():
    z = torch.rand(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bn_stats: got gamma or beta without eps"):
            backends.run("bn_stats", z, torch.rand(8), backend="triton")


def test_a_sweep_is_asked_and_answered_though_a_plan_is_known():
    case = placed("conv1x1")
    run = lambda: backends.run("conv1x1", *case.args, **case.kwargs, backend="triton")  # noqa: E731
    run()
    with configs.asked() as asked:
        run()
    assert asked, "a plan kept the question from the sweep"
