"""Which steps a program becomes: on a CPU, planned for GPUs, without sound kernels, and where nothing is kept."""

import dataclasses

import pytest
import torch
from programs import CASES, preact_bottleneck
from tuned import unsound

import resnet_fused
from resnet_fused.models import preact_resnet50
from resnet_fused.plan import choose, too_small, words
from resnet_fused.plan.devices import DEVICES
from resnet_fused.plan.lower import decided_by, lower
from resnet_fused.steps.frozen import FrozenJoin
from resnet_fused.steps.join import Join
from resnet_fused.steps.kinds import Convolve, ConvolveAndAdd, Normalise
from resnet_fused.steps.program import Call, Normalisation
from resnet_fused.steps.spec import Norm
from resnet_fused.steps.value_kinds import ConvolveTaps, ConvolveValue, ConvolveValueAdd


def single(name, **kwargs):
    program, tensors = preact_bottleneck(**kwargs) if name == "preact" else CASES[name]()
    own = [type(own)(*(None if t is None else t.detach().float() for t in own)) for own in tensors]
    return lambda x=None: Call(program, torch.randn(2, 6, 5, 5) if x is None else x, own)


def kinds(lowered):
    return [type(step) for step in lowered.steps]


def test_on_a_cpu_everything_is_on_tensors():
    call = single("preact", projected=True, outputs=7)
    lowered = lower(call())
    inner = [Normalise, Convolve, Normalise, Convolve, Normalise]
    assert kinds(lowered) == [*inner, Convolve, ConvolveAndAdd]  # the projection, and conv3 with the sum
    call = single("post-activation with projection")
    assert kinds(lower(call()))[-1] is Join


@pytest.mark.parametrize("device", DEVICES)
def test_on_gpus_convolutions_are_on_values(device):
    """But on a B200 the 1x1 ones alone."""
    call = single("preact")
    with choose.planning_for(DEVICES[device]):
        lowered = lower(call())
    inner, said = (Convolve, "convolution") if device == "b200" else (ConvolveTaps, "convolution on values")
    assert kinds(lowered) == [Normalise, ConvolveValue, Normalise, inner, Normalise, ConvolveValueAdd]
    said = f"norm on load; 1x1 on values; norm on load; {said}; norm on load; 1x1 on values that adds"
    assert words.of_steps(lowered) == said
    assert [step.statistics for step in lowered.steps if isinstance(step, ConvolveValue)] == [True]


def frozen(name):
    """With running statistics in all norms."""
    call = single(name)()
    nodes = [
        dataclasses.replace(node, norm=Norm(batch_stats=False)) if isinstance(node, Normalisation) else node
        for node in call.program.nodes
    ]
    return call._replace(program=dataclasses.replace(call.program, nodes=tuple(nodes)))


def test_frozen_norms_are_part_of_their_convolutions():
    """On GPUs; the 3x3, before a 1x1, leaves no bits, and the first norm, of the input, stays by itself."""
    call = frozen("post-activation with projection")
    assert kinds(lower(call)) != [FrozenJoin, FrozenJoin]
    with choose.planning_for(DEVICES["h100"]), choose.observing() as said:
        inner, last = lower(call).steps
        assert kinds(lower(frozen("preact"))) == [Normalise, FrozenJoin, FrozenJoin, ConvolveValueAdd]
    assert (inner.joins, inner.packs_mask, last.joins, last.packs_mask) == (False, False, True, True)
    end = "convolution with frozen norm, projection, sum, ReLU (running statistics)"
    assert said[0] == f"convolution with frozen norm, ReLU; {end}"


def test_without_a_sound_join_by_any_filter_a_3x3_is_followed_by_its_norm(monkeypatch):
    unsound(monkeypatch, "conv_join")
    with choose.planning_for(DEVICES["h100"]):
        steps = lower(frozen("post-activation with projection")).steps
    assert [type(step) for step in steps] == [Convolve, Normalise, FrozenJoin] and steps[-1].joins


@pytest.mark.parametrize("op", ["conv1x1", "conv1x1_join", "conv1x1_wgrad"])
def test_without_a_sound_product_it_is_on_tensors(monkeypatch, op):
    call = single("preact")
    unsound(monkeypatch, op)
    with choose.planning_for(DEVICES["h100"]), choose.observing() as said:
        expected = [Normalise, ConvolveTaps, Normalise, ConvolveTaps, Normalise, ConvolveAndAdd]
        assert kinds(lower(call())) == expected
    assert said[0].endswith(f"convolution and sum (no sound kernel of {op})")


def test_without_a_sound_convolution_on_values_a_3x3_is_on_a_tensor(monkeypatch):
    call = single("preact")
    unsound(monkeypatch, "conv_values")
    with choose.planning_for(DEVICES["h100"]):
        expected = [Normalise, ConvolveValue, Normalise, Convolve, Normalise, ConvolveValueAdd]
        assert kinds(lower(call())) == expected


@pytest.mark.parametrize("op", ["bn_stats", "lazy_grad_apply"])
def test_without_a_sound_kernel_it_is_stock(monkeypatch, op):
    call = single("preact")
    unsound(monkeypatch, op)
    with choose.planning_for(DEVICES["h100"]), choose.observing() as said:
        assert lower(call()).steps is None
    assert said == [f"stock (no sound kernel of {op})"]


@pytest.mark.parametrize("shape", [(2, 6, 1, 1), (1, 6, 1, 1)])
def test_what_stock_has_an_error_for_is_stocks(shape):
    call = single("preact", stride=2, projected=True)
    lowered = lower(call(torch.randn(shape)))
    assert (lowered.steps is None) == (shape[0] == 1)


@pytest.mark.plans_small
def test_small_programs_are_stocks(monkeypatch):
    monkeypatch.setattr(too_small, "HAS_AVX512", True)
    monkeypatch.setattr(too_small, "threads", lambda: 1)
    call = single("preact")
    given = call()
    read = 6 + 6 + 4 + 4 + 4 + 4  # x, its activation, and both of each inner norm
    assert too_small.stock_bytes(given, given.shapes()) == 4 * 50 * read
    for cache, small in ((4 * 50 * read, True), (4 * 50 * read - 1, False)):
        monkeypatch.setattr(too_small, "cache_bytes", lambda cache=cache: cache)
        assert (lower(call()).steps is None) == small
    monkeypatch.setattr(too_small, "cache_bytes", lambda: 1 << 40)
    monkeypatch.setattr(too_small, "_OVERHEAD", 1e-12)
    assert lower(call()).steps is not None


def test_nothing_is_kept_while_somebody_listens():
    call, x = single("preact"), torch.randn(2, 6, 5, 5)
    assert decided_by(call(x)) == decided_by(call(x.clone()))
    assert decided_by(call(x)) != decided_by(call(x.double())) and decided_by(call(x)) != decided_by(call(x[:1]))
    with choose.observing():
        assert decided_by(call(x)) is None
    before = decided_by(call(x))
    with choose.planning_for(DEVICES["h100"]):
        assert decided_by(call(x)) != before


def test_what_is_counted_for_a_pre_activation_network():
    counted = resnet_fused.explain(preact_resnet50(), (256, 3, 224, 224), dtype=torch.bfloat16, device="h100").model
    moved, saved = counted.fused.bytes / 256e6, counted.fused_saved / 256e6
    assert round(moved) == 233 and round(counted.stock.bytes / 256e6) == 434 and round(saved, 1) == 21.7
    assert counted.fused_saved < 0.56 * counted.stock_saved
