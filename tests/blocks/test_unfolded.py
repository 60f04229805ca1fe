"""Evaluation where 1x1 convolutions take their weights as they are, among others whose weights are kept."""

import itertools

import pytest
import torch
from evaluated import FROZEN, P1, error, evaluate, frozen, modules_of, moved, stock_output
from programs import CASES, F64, conv_tensors, norm_tensors

from resnet_fused.plan.lower_evaluation import lower
from resnet_fused.steps import Conv, StepTensors, unfolded, winograd
from resnet_fused.steps.evaluation_flow import Evaluation
from resnet_fused.steps.evaluation_kinds import UnfoldedConvolution
from resnet_fused.steps.program import Call, Convolution, Normalisation, Program

pytestmark = pytest.mark.skipif(not winograd.IS_BUILT, reason="no compiled library for AVX2 or AVX-512")
S2 = Conv((2, 2), (1, 1))


@pytest.fixture
def seen(monkeypatch):
    """The names of the ops that steps with unfolded weights run, as they come; these run at any level of the CPU."""
    seen, original = [], Evaluation.run
    monkeypatch.setattr(unfolded, "IS_FAST", True)
    monkeypatch.setattr(unfolded, "_LEAST_PIXELS", 1)

    def run(e: Evaluation, op: str, *arguments):
        seen.extend([op] * op.startswith("conv_norm_add_relu"))
        return original(e, op, *arguments)

    monkeypatch.setattr(Evaluation, "run", run)
    return seen


def test_a_1x1_with_its_weight_as_it_is_among_others_sees_every_write(seen):
    """Nothing of it is compared; of the 3x3 and its norm all is."""
    program, tensors = frozen(*CASES["post-activation"]())
    call = moved(Call(program, torch.randn(2, 6, 5, 5, dtype=F64), tensors), torch.float32)
    lowered, modules = lower(call), modules_of(call)
    kinds = [type(step) for step in lowered.steps]
    pointwise = [own.weight.shape[2] == 1 for own in tensors if own.weight is not None]
    assert 0 < kinds.count(UnfoldedConvolution) == sum(pointwise) < len(pointwise)
    kept = {node for node, own in enumerate(tensors) if own.weight is not None and own.weight.shape[2] > 1}
    assert kept <= set(lowered.folded) and len(lowered.folded) == 2 * len(kept)
    for _ in range(3):
        evaluate(call, modules)
    for i, own in itertools.product(range(6), call.tensors):
        if own[i] is not None:
            own[i].numpy().__imul__(1.5)
            seen.clear()
            exact = stock_output(moved(call, F64))
            assert error(evaluate(call, modules), exact) <= 2 * error(stock_output(call), exact) + 2e-6
            assert len(seen) == sum(pointwise)


def test_unfolded_sums_are_made_in_place_of_what_nobody_else_reads(seen):
    for name, in_place in [("identity", False), ("projection", True), ("activated shortcut", False)]:
        seen.clear()
        program, tensors = frozen(*CASES[name]())
        call = moved(Call(program, torch.randn(2, 6, 5, 5, dtype=F64), tensors), torch.float32)
        before = call.x.clone()
        torch.testing.assert_close(evaluate(call, modules_of(call)), stock_output(call), rtol=1e-4, atol=1e-4)
        assert ("conv_norm_add_relu_" in seen) == in_place and torch.equal(call.x, before)


def test_a_norm_that_became_double_is_not_left_to_the_op(seen):
    program, tensors = frozen(*CASES["post-activation"]())
    call = moved(Call(program, torch.randn(2, 6, 5, 5, dtype=F64), tensors), torch.float32)
    modules = modules_of(call)
    expected = evaluate(call, modules)
    wide = [type(own)(*(t if t is None or own.weight is not None else t.double() for t in own)) for own in call.tensors]
    torch.testing.assert_close(evaluate(call._replace(tensors=wide), modules), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_stride_of_onednn_behind_an_unfolded_convolution_passes_nan(seen, value):
    """Of what enters it no bound is known, so its ReLU is not oneDNN's."""
    program = Program(
        (
            Convolution(0, P1),
            Normalisation(1, FROZEN, relu=True),
            Convolution(2, S2),
            Normalisation(3, FROZEN, relu=True),
        )
    )
    _, tensors = frozen(
        program,
        [conv_tensors(6, 8), norm_tensors(8), StepTensors(torch.randn(8, 8, 3, 3, dtype=F64) / 9), norm_tensors(8)],
    )
    x = torch.randn(2, 6, 9, 9, dtype=F64)
    x[0, 0, 4, 4] = value
    call = moved(Call(program, x, tensors), torch.float32)
    modules = modules_of(call)
    for _ in range(3):
        got, want = evaluate(call, modules), stock_output(call)
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)
