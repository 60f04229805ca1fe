"""A plan for a GPU never leaves an op over activations to the reference: the next variant whose ops are all sound."""

import pytest
import torch
from chains import Chain, call_of, make_step
from tuned import bottleneck_call, unsound

from resnet_fused.backends import soundness
from resnet_fused.backends import triton as room
from resnet_fused.ops import OPS
from resnet_fused.plan import choose, lower, variants
from resnet_fused.plan.devices import DEVICES
from resnet_fused.steps import Pool


def images():
    return torch.randn(2, 6, 4, 4).bfloat16()


def chosen():
    """The variant that is taken, its steps, and what is said of it."""
    with choose.planning_for(DEVICES["h100"]), choose.observing() as notes:
        return *lower.decide(bottleneck_call(images())), notes[-1]


def ops_of(lowered):
    return {op for step in lowered.steps or () for op in step.ops(lowered.program)}


def test_with_everything_sound():
    variant, _, note = chosen()
    assert (variant.values, variant.gram, variant.one_pass, variant.stock) == (True, True, True, False)
    assert "; Gram join on values" in note and "no sound kernel" not in note


@pytest.mark.parametrize(
    ("ops", "values", "gram", "one_pass", "stock"),
    [
        (["conv1x1_backward"], True, True, False, False),
        (["gram"], True, False, True, False),
        (["gram_grad"], True, False, True, False),
        (["conv1x1_join"], True, False, True, False),
        (["gram_norm", "conv1x1_backward"], True, False, False, False),
        (["conv1x1"], False, False, False, False),
        (["conv1x1_dgrad"], False, False, False, False),
        (["conv1x1_wgrad"], False, False, False, False),
        (["norm_add_relu"], False, False, False, True),
        (["bn_stats"], False, False, False, True),
        (["bn_affine"], False, False, False, True),
        (room.OPS, False, False, False, True),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_next_sound_variant(monkeypatch, ops, values, gram, one_pass, stock):
    unsound(monkeypatch, *ops)
    variant, lowered, note = chosen()
    assert (variant.values, variant.gram, variant.one_pass, variant.stock) == (values, gram, one_pass, stock)
    assert not ops_of(lowered) & set(ops)
    # of one pass the cost model already knows
    assert note.endswith(f"(no sound kernel of {chosen_first(ops)})") or ops == ["conv1x1_backward"]
    with choose.planning_for(DEVICES["h100"]):
        call = bottleneck_call(images())
        found = lower.allowed(call)
    assert not any(ops_of(lower.steps_of(call, v)) & set(ops) for v in found)
    assert found[-1].stock


def chosen_first(ops):
    with choose.planning_for(DEVICES["h100"]):
        call = bottleneck_call(images())
        best = lower.steps_of(call, variants.modelled(call, call.shapes()))
    return next((op for step in best.steps for op in step.ops(best.program) if op in ops), "")


def test_a_stem_is_pooled_by_sound_kernels_alone(monkeypatch):
    step, own = make_step(6, 24)
    call = call_of(Chain((step,), pool=Pool()), images(), [own])
    with choose.planning_for(DEVICES["h100"]):
        assert lower.lower(call).steps is not None
        unsound(monkeypatch, "norm_relu_pool_backward")
        assert lower.lower(call).steps is None


def test_a_forced_backend_and_the_cpu_are_not_asked(monkeypatch):
    monkeypatch.setattr(soundness, "lacking", lambda *question: pytest.fail("asked"))
    assert lower.lower(bottleneck_call(torch.randn(2, 6, 4, 4))).steps is not None


def test_what_steps_are_said_to_need_are_ops():
    with choose.planning_for(DEVICES["h100"]):
        call = bottleneck_call(images())
        for variant in lower.allowed(call):
            assert ops_of(lower.steps_of(call, variant)) <= set(room.OPS) <= set(OPS)
