"""Which variants may be measured, and that the cost model's choice is one of them."""

import copy

import pytest
import torch
from chains import make_step
from tuned import block, bottleneck, images, notes, single, unsound

import resnet_fused
from resnet_fused.plan import choose
from resnet_fused.plan.devices import DEVICES
from resnet_fused.plan.measured import Variant
from resnet_fused.steps import Chain


def kinds(chain, tensors, x=None, factor=None):
    x = torch.randn(2, 6, 4, 4) if x is None else x
    *found, last = choose.variants(chain, x, tensors, factor)
    assert last == Variant(stock=True)
    return [(v.lazy, v.gram, v.gram_shortcut, v.keep) for v in found]


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


def one_pass(x):
    chain, tensors = bottleneck()
    shapes = [torch.Size((2, channels, 4, 4)) for channels in (4, 4, 10)]
    chosen = choose.modelled(chain, x, tensors, shapes, None)
    measured = {variant.one_pass for variant in choose.variants(chain, x, tensors, None)}
    assert chosen.lazy and measured == {False, chosen.one_pass}
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
    chain, tensors = bottleneck(stride, **kwargs)
    x, size = torch.randn(2, 6, 4, 4), 4 // stride
    shapes = [torch.Size((2, 4, 4, 4)), torch.Size((2, 4, size, size)), torch.Size((2, 10, size, size))]
    for factor in (None, torch.ones(2)):

        def check(factor=factor):
            chosen = choose.modelled(chain, x, tensors, shapes, factor)
            assert chosen in [variant.of(chain) for variant in choose.variants(chain, x, tensors, factor)]

        if device is None:
            check()
        else:
            with choose.planning_for(DEVICES[device]):
                check()


def test_lazy_variants_are_measured_and_run(clock, monkeypatch):
    """Where there are 1x1 kernels; here the reference stands in for them."""
    monkeypatch.setattr(choose, "value_device", lambda backend, x: DEVICES["h100"])
    wanted = Variant(True, True, False, True)
    clock.wins = lambda variant: variant == wanted
    model, x = block(), images()
    (chain,) = resnet_fused.tune(model, x).chains
    assert chain.chosen == "lazy, Gram join, activations kept"
    saved = {candidate.variant: candidate.saved for candidate in chain.candidates}
    assert len(saved) == 6
    assert saved["lazy, plain join"] > saved["lazy, Gram join"]
    assert saved["lazy, Gram join, activations kept"] > saved["lazy, Gram join"]
    assert notes(model, x) == ["lazy, Gram join (measured)"]
    torch.testing.assert_close(model(x), resnet_fused.unfuse(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-4)
