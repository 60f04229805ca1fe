"""Which variants may be measured, and that the cost model's choice is one of them."""

import copy

import pytest
import torch
from chains import Chain, call_of, make_step
from tuned import block, bottleneck, bottleneck_call, ends, images, single, unsound

import resnet_fused
from resnet_fused.plan import choose, lower, variants
from resnet_fused.plan.devices import DEVICES
from resnet_fused.plan.variants import Variant


def kinds(chain, tensors, x=None, factor=None, taps=False):
    x = torch.randn(2, 6, 4, 4) if x is None else x
    *found, last = lower.allowed(call_of(chain, x, tensors, factor=factor))
    assert last == Variant(stock=True)
    return [(v.values, v.gram, v.gram_shortcut, v.keep) for v in found if v.taps == taps]


def joins(*pairs):
    return [(False, *pair, False) for pair in pairs]


def test_variants_on_the_cpu():
    every = joins((0, 0), (0, 1), (1, 0), (1, 1))
    assert kinds(*bottleneck()) == every
    assert kinds(*bottleneck(stride=2)) == every
    assert kinds(*bottleneck(projected=False)) == joins((0, 0), (1, 0))
    assert kinds(*bottleneck(kernel=3)) == joins((0, 0), (0, 1))
    assert kinds(*bottleneck(), factor=torch.ones(2)) == joins((0, 0), (0, 1))
    assert kinds(*bottleneck(bias=True)) == joins((0, 0))
    assert kinds(*bottleneck(bias=True, kernel=3, batch_stats=False)) == every
    assert kinds(*bottleneck(), x=torch.randn(2, 6, 4, 4, dtype=torch.float64)) == joins((0, 0))
    step, own = make_step(6, 24, stride=2)
    assert kinds(Chain((step,)), single([own])) == joins((0, 0))


def test_variants_on_values():
    with choose.planning_for(DEVICES["h100"]):
        grams = ((0, 0), (1, 0), (1, 1))
        lazy = [(True, *gram, keep) for gram in grams for keep in (False, True)]
        assert kinds(*bottleneck()) == [(False, False, False, False), *lazy]
        step, own = make_step(6, 24)
        one = [(False,) * 4, (True, False, False, True), (True, True, False, True)]
        assert kinds(Chain((step,)), single([own])) == one
        assert kinds(*bottleneck(kernel=3)) == joins((0, 0))


def test_variants_with_all_convolutions_on_values(monkeypatch):
    """Where nothing is written for a convolution, nothing can be kept."""
    assert kinds(*bottleneck(), taps=True) == []
    with choose.planning_for(DEVICES["h100"]):
        every = [(False, False, False, False), *((True, *gram, True) for gram in ((0, 0), (1, 0), (1, 1)))]
        assert kinds(*bottleneck(), taps=True) == every
        assert kinds(*bottleneck(kernel=3), taps=True) == joins((0, 0))
        call = bottleneck_call(torch.randn(2, 6, 4, 4))
        assert variants.modelled(call, call.shapes()).taps
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cudnn, "allow_tf32", False)
            assert kinds(*bottleneck(), taps=True) == []
        unsound(monkeypatch, "conv_values")
        assert not variants.modelled(call, call.shapes()).taps


def one_pass(x):
    call = bottleneck_call(x)
    chosen = variants.modelled(call, call.shapes())
    measured = {variant.one_pass for variant in lower.allowed(call)}
    assert chosen.values and measured == {False, chosen.one_pass}
    return chosen.one_pass


def test_narrow_gradients_take_one_pass_in_16_bit_where_its_kernel_is_trusted(monkeypatch):
    x = torch.randn(2, 6, 4, 4)
    with choose.planning_for(DEVICES["h100"]):
        assert one_pass(x.bfloat16()) and one_pass(x.half()) and not one_pass(x)
        unsound(monkeypatch, "conv1x1_backward")
        assert not one_pass(x.bfloat16())


@pytest.mark.parametrize("device", [None, *DEVICES])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kwargs", [{}, {"kernel": 3}, {"bias": True}, {"batch_stats": False}, {"projected": False}])
def test_the_cost_model_chooses_among_the_variants(device, stride, kwargs):
    for factor in (None, torch.ones(2)):

        def check(factor=factor):
            call = bottleneck_call(torch.randn(2, 6, 4, 4), factor, stride=stride, **kwargs)
            assert variants.modelled(call, call.shapes()) in lower.allowed(call)

        if device is None:
            check()
        else:
            with choose.planning_for(DEVICES[device]):
                check()


def test_variants_on_values_are_measured_and_run(clock, monkeypatch):
    """Where there are 1x1 kernels; here the reference stands in for them."""
    monkeypatch.setattr(choose, "value_device", lambda backend, x: DEVICES["h100"])
    wanted = Variant(True, True, False, True)
    clock.wins = lambda variant: variant == wanted
    model, x = block(), images()
    (chain,) = resnet_fused.tune(model, x).chains
    assert chain.chosen == "on values, Gram join, activations kept"
    saved = {candidate.variant: candidate.saved for candidate in chain.candidates}
    assert len(saved) == 6
    assert saved["on values, plain join"] > saved["on values, Gram join"]
    assert saved["on values, Gram join, activations kept"] > saved["on values, Gram join"]
    assert ends(model, x) == ["Gram join on values (measured)"]
    torch.testing.assert_close(model(x), resnet_fused.unfuse(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-4)


def test_gram_joins_by_the_compiled_kernels(monkeypatch):
    """On GPUs without Triton, or where they are asked for; on tensors, if no kernel of theirs is doubted."""
    x, lacks = torch.randn(8, 6, 16, 16).bfloat16(), set()
    monkeypatch.setattr(choose, "on_gpu", lambda x: True)
    monkeypatch.setattr(choose, "_HAS_TRITON", False)
    monkeypatch.setattr(choose.devices, "of", lambda device: DEVICES["h100"])
    monkeypatch.setattr(choose, "lacking", lambda ops, x, *backend: next((op for op in ops if op in lacks), ""))

    def kinds_of(**kwargs):
        *found, _ = lower.allowed(bottleneck_call(x, **kwargs))
        return [(v.values, v.gram, v.gram_shortcut, v.keep) for v in found]

    every = joins((0, 0), (0, 1), (1, 0), (1, 1))
    assert kinds_of() == every and kinds_of(kernel=3) == joins((0, 0), (0, 1)) and kinds_of(bias=True) == joins((0, 0))
    call = bottleneck_call(x)
    assert variants.modelled(call, call.shapes())[:3] == (False, True, True)
    assert choose.join_device("triton", x) is None and choose.join_device("cuda", x.double()) is None
    for op in ("gram", "conv_add_relu_"):
        lacks.add(op)
        assert kinds_of() == joins((0, 0)) and choose.join_device("cuda", x) is None
        lacks.remove(op)
    monkeypatch.setattr(choose, "_HAS_TRITON", True)
    assert choose.join_device("auto", x) is None and choose.join_device("cuda", x) == DEVICES["h100"]
