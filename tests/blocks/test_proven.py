"""A module is bypassed only while it is what its class was."""

import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from resnet_fused.blocks import norms, proven
from resnet_fused.blocks.layers import why_not_conv, why_not_passed


class Plain(nn.Conv2d):
    """A subclass that changes nothing of a call."""

    def __init__(self, *args):
        super().__init__(*args)
        self.name = "mine"

    def extra_repr(self):
        return self.name

    def count(self):
        return self.weight.numel()


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Computed(nn.Conv2d):
    @property
    def stride(self):
        return (1, 1)

    @stride.setter
    def stride(self, value):
        pass


def test_stock_modules_and_harmless_subclasses_may_be_bypassed():
    for conv in (nn.Conv2d(3, 4, 3), Plain(3, 4, 3)):
        assert why_not_conv(conv) == ""
    assert norms.why_not(nn.BatchNorm2d(3)) == ""
    for module in (nn.ReLU(), nn.ReLU(inplace=True), nn.Identity(), nn.Sequential(nn.ReLU())):
        assert why_not_passed(module) == ""


@pytest.mark.parametrize("kind", [Standardised, Computed])
def test_subclasses_that_change_a_call_may_not(kind):
    assert kind.__name__ in why_not_conv(kind(3, 4, 3))


def test_parametrised_weights_may_not():
    conv = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    before = conv.parametrizations.weight[0]._u.clone()
    assert "weight" in why_not_conv(conv)
    assert torch.equal(conv.parametrizations.weight[0]._u, before)  # and were not read to find out
    norm = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    assert "weight" in norms.why_not(norm)


@pytest.mark.parametrize("name", ["forward", "_conv_forward", "_call_impl", "__call__"])
def test_methods_on_the_instance(name):
    conv = nn.Conv2d(3, 4, 3)
    conv.__dict__[name] = types.MethodType(lambda self, *args: None, conv)
    assert name in why_not_conv(conv)
    relu = nn.ReLU()
    relu.__dict__[name] = lambda x: x
    assert bool(why_not_passed(relu)) == (name != "_conv_forward")  # a ReLU calls nothing of that name


@pytest.mark.parametrize(
    ("module", "name"), [(nn.Conv2d, "_conv_forward"), (nn.BatchNorm2d, "forward"), (nn.Module, "_call_impl")]
)
def test_methods_replaced_on_the_class(monkeypatch, module, name):
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: original(*args, **kwargs))
    assert "was replaced" in (why_not_conv(conv) or norms.why_not(norm))


def test_functions_exchanged(monkeypatch):
    assert not proven.functions_exchanged()
    monkeypatch.setattr(F, "batch_norm", lambda *args, **kwargs: None)
    assert proven.functions_exchanged()


@pytest.mark.parametrize("name", ["eps", "running_mean", "num_batches_tracked"])
def test_settings_that_stock_words_better(name):
    norm = nn.BatchNorm2d(4, momentum=None)
    assert norms.obstacle(norm) == ""
    setattr(norm, name, 0.0 if name == "eps" else None)
    assert norms.obstacle(norm)


def test_looking_draws_no_random_numbers():
    class Unseen(Plain):
        pass

    conv, before = Unseen(3, 4, 3), torch.get_rng_state()
    assert why_not_conv(conv) == ""
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "patch",
    ["nn.Conv2d.forward = other(nn.Conv2d.forward)", "nn.Module._call_impl = other(nn.Module._call_impl)",
     "F.batch_norm = other(F.batch_norm)"],
)  # fmt: skip
def test_what_was_exchanged_before_import_is_not_taken_for_stock(patch):
    script = f"""
import functools, torch
from torch import nn
from torch.nn import functional as F

def other(f):
    @functools.wraps(f)
    def g(*args, **kwargs):
        return 2 * f(*args, **kwargs)
    return g

{patch}
import warnings
warnings.simplefilter("ignore")
import resnet_fused
from resnet_fused.models.resnet import BasicBlock

torch.manual_seed(0)
stock, x = BasicBlock(4, 4).eval(), torch.randn(2, 4, 8, 8)
want = stock(x)
assert torch.equal(resnet_fused.fuse(stock)(x), want)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
