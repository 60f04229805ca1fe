"""What the plan is told of kernels: missing, unavailable, of another dtype, failed, and mended again."""

import dataclasses
import warnings

import pytest
import torch
from injected import CPU, F32, a_bit_off

from resnet_fused.backends import backends, cuda, dispatch, soundness
from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck import judge


@pytest.fixture(autouse=True)
def forgotten():
    soundness.forget()
    yield
    soundness.forget()


@pytest.fixture
def only(inject, monkeypatch):
    """Injects a kernel into a machine that has no other but the reference."""

    def put(*args):
        injected = inject(*args)
        monkeypatch.setattr(dispatch, "_backends", {"injected": injected.backend, "reference": backends()["reference"]})
        return injected

    return put


def lacking(*ops, dtype=F32, device=CPU, checks=True):
    return soundness.lacking(ops, dtype, device, checks)


def test_the_reference_does_not_count(only):
    injected = only("bn_stats")
    assert lacking("bn_stats") == ""
    assert lacking("bn_stats", "gram", "norm_add_relu") == "gram"
    assert lacking("bn_stats", dtype=torch.float16) == "bn_stats"  # it takes float32 and bfloat16
    injected.backend.unavailable = "no compiler"
    soundness.forget()
    assert lacking("bn_stats") == "bn_stats"


def test_an_answer_costs_no_second_check(only):
    injected = only("bn_stats")
    assert lacking("bn_stats") == ""
    runs = injected.runs
    assert lacking("bn_stats") == "" and injected.runs == runs > 0


def test_a_failed_check_and_its_repeal_are_seen(only):
    injected = only("bn_stats")
    assert lacking("bn_stats") == ""
    injected.change = a_bit_off
    judge.check_all(CPU, [injected.backend])  # as `verify` does, of all backends
    assert lacking("bn_stats") == "bn_stats"
    injected.change = lambda results, *args, **kwargs: results
    judge.check_all(CPU, [injected.backend])
    assert lacking("bn_stats") == ""


def test_a_kernel_that_cannot_be_compiled(only):
    def raises(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler")

    only("bn_stats", raises)
    with pytest.warns(RuntimeWarning, match="Failed to find C compiler"):
        assert lacking("bn_stats") == "bn_stats"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lacking("bn_stats") == "bn_stats"


def test_fake_tensors_run_no_check_but_heed_verdicts(only):
    injected = only("bn_stats", a_bit_off)
    assert lacking("bn_stats", checks=False) == "" and injected.runs == 0
    with pytest.warns(RuntimeWarning):
        assert lacking("bn_stats") == "bn_stats"
    assert lacking("bn_stats", checks=False) == "bn_stats"


def test_ops_on_vectors_are_asked_for_in_float32(only):
    only("bn_affine", lambda *args: pytest.fail("not in this dtype") if args[1].dtype != F32 else args[0])
    assert lacking("bn_affine", dtype=torch.float16) == ""


def test_a_gpu_that_need_not_be_there():
    assert lacking(*room.OPS, dtype=torch.bfloat16, device=None) == ""
    assert lacking("conv1x1", dtype=torch.float64, device=None) == "conv1x1"
    assert lacking("winograd_conv3x3", dtype=torch.bfloat16, device=None) == "winograd_conv3x3"


@pytest.mark.parametrize("assumed", [True, False])
def test_compiled_kernels_that_need_not_be_there(monkeypatch, assumed):
    """They are taken to be built where this PyTorch could not load them anyway."""
    monkeypatch.setattr(cuda, "ASSUMED", frozenset(cuda.CONVOLUTIONS if assumed else ()))
    soundness.forget()
    assert lacking("conv_norm_add_relu", dtype=torch.bfloat16, device=None) == ("" if assumed else "conv_norm_add_relu")
    assert lacking("conv_norm_add_relu", dtype=torch.float64, device=None) == "conv_norm_add_relu"
    soundness.forget()


def narrow(outputs, inputs, coupled):
    return ["is too wide"] if max(outputs, inputs) > (4 if coupled else 8) else []


def test_widths_are_those_of_a_declared_kernel(only):
    """Also where it cannot run: a plan may be for another machine. The reference, which takes all, is no kernel."""
    injected = only("conv1x1_backward")
    kernels = injected.backend.kernels
    assert soundness.takes("conv1x1_backward", 512, 512) and not soundness.takes("conv1x1", 1, 1)
    kernels["conv1x1_backward"] = dataclasses.replace(kernels["conv1x1_backward"], widths=narrow)
    injected.backend.unavailable = "there is no GPU"
    assert soundness.takes("conv1x1_backward", 8, 8) and not soundness.takes("conv1x1_backward", 9, 8)
    assert soundness.takes("conv1x1_backward", 4, 4, True) and not soundness.takes("conv1x1_backward", 8, 8, True)


def test_a_graph_asks_for_widths_while_it_is_traced(only):
    injected = only("conv1x1_backward")
    kernels = injected.backend.kernels
    kernels["conv1x1_backward"] = dataclasses.replace(kernels["conv1x1_backward"], widths=narrow)

    def double_if_narrow(x):
        return 2 * x if soundness.takes("conv1x1_backward", *x.shape[:2]) else x

    compiled = torch.compile(double_if_narrow, backend="eager", fullgraph=True)
    assert compiled(torch.ones(8, 8)).sum() == 128 and compiled(torch.ones(8, 9)).sum() == 72


def test_a_graph_asks_while_it_is_traced(only):
    injected = only("bn_stats", a_bit_off)

    def double(x):
        return 2 * x if soundness.lacking(("bn_stats",), x.dtype, x.device, True) else x

    with pytest.warns(RuntimeWarning, match="switched off injected"):
        assert torch.compile(double, backend="eager", fullgraph=True)(torch.ones(())) == 2
    assert injected.runs > 0
    assert judge.remembered("injected", "bn_stats", F32, CPU)
