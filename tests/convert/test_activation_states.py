"""Activations other than ReLU in the states that users bring about: other settings, hooks, methods, functions."""

import copy

import pytest
import torch
from activated import MODULES, Functions, Inverted, assert_same, image, pair
from torch import nn
from torch.nn import functional as F

import resnet_fused


def leaky(slope):
    return lambda: nn.LeakyReLU(slope)


class Louder(nn.SiLU):
    def forward(self, x):
        return 2 * super().forward(x)


OTHERS = {"negative slope": leaky(-0.5), "slope over 1": leaky(1.5), "subclass": Louder, "ELU": nn.ELU, "Mish": nn.Mish}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_others_stay_stock(make):
    fused, stock = pair(Inverted(make, 1))
    assert "leaky" not in str(resnet_fused.report(fused))
    assert_same(fused, stock, image())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name, setting",
    [
        ("leaky relu", {"negative_slope": 0.7}),
        ("leaky relu", {"negative_slope": -0.7}),
        ("gelu", {"approximate": "tanh"}),
        ("relu6", {"max_val": 3.0}),
    ],
)
def test_a_setting_that_changes_after_fuse_counts(name, setting, training):
    fused, stock = pair(Inverted(MODULES[name], 1))
    fused.train(training), stock.train(training)
    assert_same(fused, stock, image(), runs=1)
    for model in (fused, stock):
        vars(model.act2).update(setting)
    for _ in range(2):
        assert_same(fused, stock, image())


@pytest.mark.parametrize("fused_before", [True, False])
@pytest.mark.parametrize(
    "name, setting",
    [
        ("silu", "inplace"),
        ("leaky relu", "negative_slope"),
        ("leaky relu", "inplace"),
        ("gelu", "approximate"),
        ("relu6", "max_val"),
    ],
)
def test_a_setting_that_is_lost_raises_as_in_stock(name, setting, fused_before):
    """As in a module that an older PyTorch saved."""
    stock = Inverted(MODULES[name], 1).double()
    fused = resnet_fused.fuse(copy.deepcopy(stock)) if fused_before else copy.deepcopy(stock)
    for model in (fused, stock):
        del vars(model.act2)[setting]
    resnet_fused.fuse(fused)
    for model in (fused, stock):
        with resnet_fused.use("cpu"), pytest.raises(AttributeError, match=setting):
            model(image())


def test_hooks_on_an_activation_run():
    fused, stock = pair(Inverted(nn.SiLU, 1))
    seen = []
    fused.act2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert_same(fused, stock, image())
    assert seen == [torch.Size((3, 12, 9, 7))]


def test_a_method_on_an_activation_runs():
    fused, stock = pair(Inverted(nn.Hardswish, 1))
    for model in (fused, stock):
        model.act1.forward = torch.tanh
    assert_same(fused, stock, image())


@pytest.mark.parametrize("function", ["silu", "hardtanh"])
def test_an_exchanged_function_is_called(function, monkeypatch):
    fused, stock = pair(Inverted(nn.SiLU if function == "silu" else nn.ReLU6, 1))
    assert_same(fused, stock, image(), runs=1)
    monkeypatch.setattr(F, function, lambda x, *args, **kwargs: torch.tanh(x))
    assert_same(fused, stock, image())


def test_an_exchanged_function_of_a_forward_is_called(monkeypatch):
    fused, stock = pair(Functions())
    monkeypatch.setattr(F, "gelu", lambda x, **kwargs: torch.tanh(x))
    assert_same(fused, stock, image())


class Optional(nn.Module):
    """A forward that asks for a child that there may be, as timm's ConvNormAct does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.1)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = self.aa(x)
        return x


@pytest.mark.parametrize("later", [None, nn.Tanh(), torch.tanh])
def test_a_child_that_there_may_be(later):
    fused, stock = pair(Optional())
    assert_same(fused, stock, image(), runs=1)
    for model in (fused, stock):
        model.aa = later
    for _ in range(2):
        assert_same(fused, stock, image())


class Asking(Optional):
    """One that asks for what is no child, constant or nothing."""

    def helper(self, x):
        return x * 2

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return getattr(self, "helper")(x)  # noqa: B009


def test_a_method_that_is_asked_for_is_not_traced():
    fused, stock = pair(Asking())
    assert "fused: conv" not in str(resnet_fused.report(fused))
    assert_same(fused, stock, image(), runs=0)


class Rebound(Optional):
    """One whose self is its child in the end."""

    def __init__(self):
        super().__init__()
        self.inner, self.adds = Optional(), True
        self.inner.adds = True

    def forward(self, x):
        x = self.act(self.bn(self.conv(self.inner(x))))
        self = self.inner
        return x + 1 if self.adds else x


def test_what_another_self_has_counts():
    fused, stock = pair(Rebound())
    assert_same(fused, stock, image())
    for model in (fused, stock):
        model.inner.adds = False
    assert_same(fused, stock, image())
