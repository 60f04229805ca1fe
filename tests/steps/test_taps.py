"""Convolutions by any filter on values, as on a GPU, by the reference in float64: each gradient against stock."""

import dataclasses

import pytest
import torch
from chains import Chain, assert_equal, make_step
from programs import CASES, F64, factor_of, leaves_of, observe

from resnet_fused.plan import choose, gpu_values
from resnet_fused.plan.lower import steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Call
from resnet_fused.steps.program_node import run_program
from resnet_fused.steps.stock import program_output
from resnet_fused.steps.value_kinds import ConvolveTaps

VARIANTS = {"all": Variant(taps=True), "beside 1x1": Variant(True, taps=True)}
NAMES = ["post-activation", "post-activation with projection, sampled", "post-activation without ReLU"]
NAMES += ["activated shortcut", "strided projection", "two norms of one value", "a projection of a norm"]
NAMES += ["a raw value read twice", "averaged shortcut"]


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Whose kernels the reference stands for."""
    torch.manual_seed(0)

    def without_bias(call):
        return frozenset(value for value, _, own in call.convolutions if own.bias is None)

    monkeypatch.setattr(choose, "on_gpu", lambda x: True)
    monkeypatch.setattr(gpu_values, "taps", without_bias)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, variant):
    program, tensors = CASES[name]()
    program = dataclasses.replace(program, backend="reference")
    x = torch.randn(2, 6, 5, 5, dtype=F64, requires_grad=True)
    call, leaves = Call(program, x, tensors, None, factor_of(program, x)), leaves_of(x, tensors)
    lowered = steps_of(call, VARIANTS[variant])
    assert any(isinstance(step, ConvolveTaps) for step in lowered.steps)
    got, want = observe(run_program(lowered, call), leaves), observe(program_output(call), leaves)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def basic(projected=False, **kwargs):
    outputs, stride = (10, 2) if projected else (6, 1)
    pairs = [make_step(6, outputs, 3, stride=stride, **kwargs), make_step(outputs, outputs, 3, **kwargs)]
    shortcut = make_step(6, outputs, stride=stride, **kwargs) if projected else None
    tensors = [own for _, own in [*pairs, *([shortcut] if shortcut else [])]]
    steps = tuple(step for step, _ in pairs)
    return Chain(steps, shortcut and shortcut[0], identity=not projected, backend="reference", taps=True), tensors


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("options", [{}, {"projected": True}, {"batch_stats": False}], ids=str)
def test_a_basic_block(options, sampled, relu):
    chain, tensors = basic(**options)
    x = torch.randn(3, 6, 5, 4, dtype=F64, requires_grad=True)
    factor = torch.tensor([0.0, 2.0, 2.0], dtype=F64) if sampled else None
    residual = None if chain.shortcut else x
    assert_equal(dataclasses.replace(chain, relu=relu), x, tensors, residual, factor)
