"""Launches of kept binaries: what is handed to Triton's launcher, and when it is left to Triton itself."""

import types

import pytest
import torch

bound = pytest.importorskip("resnet_fused.backends.triton.bound")
CUDA = torch.device("cuda", 3)


class Kernel:
    """As much of a ``JITFunction`` as is looked at."""

    arg_names = ("x_ptr", "out_ptr", "M", "BLOCK")

    def __init__(self):
        self.pre_run_hooks = []


class Compiled:
    """As much of a ``CompiledKernel``; notes its launches."""

    function, packed_metadata, metadata = "function", "packed", "metadata"

    def __init__(self):
        self.started = []

    def run(self, *arguments):
        self.started.append(arguments)


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(bound, "_stream", lambda index: ("stream of", index))
    return bound.Bound(Kernel())


def test_nothing_is_started_before_triton_has_launched_once(launch):
    assert not launch.start(7, CUDA, ("x", "out"))


def test_the_launcher_is_given_what_triton_gives_it(launch):
    """``run(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *all parameters)``"""
    compiled = Compiled()
    launch.keep(compiled, 2, {"BLOCK": 128, "M": 5})
    for tensors in (("x", "out"), ("other", "place")):
        assert launch.start(7, CUDA, tensors)
    begin = (7, 1, 1, ("stream of", 3), "function", "packed", None, None, None)
    assert compiled.started == [(*begin, "x", "out", 5, 128), (*begin, "other", "place", 5, 128)]


def listen(kind, monkeypatch, launch):
    if kind == "pre-run hook":
        launch.kernel.pre_run_hooks.append(print)
    elif kind == "stages hook":
        monkeypatch.setattr(bound._runtime, "add_stages_inspection_hook", print)
    else:
        monkeypatch.setattr(bound._runtime, f"launch_{kind}_hook", types.SimpleNamespace(calls=[print]))


@pytest.mark.parametrize("kind", ["enter", "exit", "pre-run hook", "stages hook"])
def test_whoever_listens_hears_of_every_launch(kind, monkeypatch, launch):
    launch.keep(Compiled(), 2, {"BLOCK": 128, "M": 5})
    listen(kind, monkeypatch, launch)
    assert not launch.start(7, CUDA, ("x", "out")) and not launch.compiled.started


def test_a_hook_of_a_kind_that_is_not_known_counts_as_listening(monkeypatch, launch):
    launch.keep(Compiled(), 2, {"BLOCK": 128, "M": 5})
    monkeypatch.setattr(bound._runtime, "launch_enter_hook", object())
    assert not launch.start(7, CUDA, ("x", "out"))


def test_an_empty_chain_of_hooks_does_not(launch):
    assert not bound.watched(launch.kernel)


@pytest.mark.parametrize("meta", [{"BLOCK": 128}, {"BLOCK": 128, "M": 5, "extra": 1}], ids=["default", "unknown"])
def test_parameters_that_are_not_all_given_by_name_are_left_to_triton(meta, launch):
    launch.keep(Compiled(), 2, meta)
    assert not launch.start(7, CUDA, ("x", "out"))


def test_a_kernel_without_what_the_launcher_needs_is_left_to_triton(launch):
    launch.keep(types.SimpleNamespace(run=print, function="function"), 2, {"BLOCK": 128, "M": 5})
    assert not launch.start(7, CUDA, ("x", "out"))
