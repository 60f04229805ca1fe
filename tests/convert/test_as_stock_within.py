"""A module around fused stages that ran as stock is asked anew when something within it could change the choice."""

import copy
import gc
import weakref

import pytest
import small_cache
import torch
from small_cache import image
from torch import nn

import resnet_fused
from resnet_fused.convert import as_stock
from resnet_fused.models import BasicBlock
from resnet_fused.models.stochastic_depth import StochasticDepth
from resnet_fused.plan import too_small

pytestmark = pytest.mark.plans_small


@pytest.fixture(autouse=True)
def where_small_is_stock(monkeypatch):
    small_cache.assume(monkeypatch)


class Around(nn.Module):
    """A program, then a fused stage within the same module."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))

    def forward(self, x):
        return self.layers(torch.relu(self.bn(self.conv(x))))


@torch.no_grad()
def test_a_module_around_fused_ones_is_known_unless_something_hindered_them(monkeypatch):
    monkeypatch.setattr(too_small, "is_small_in_evaluation", lambda *args: True)
    model, x = resnet_fused.fuse(Around()).eval(), image()
    hook = model.layers[0].conv1.register_forward_hook(lambda *args: None)
    model(x)
    assert not as_stock.is_known(model, x)
    hook.remove()
    model(x)
    assert as_stock.is_known(model, x)


def _known_around():
    """A module around a fused stage, and a call that it knows."""
    model, x = resnet_fused.fuse(Around()), image()
    model(x), model.layers(x)
    assert as_stock.is_known(model, x) and as_stock.is_known(model.layers, x)
    return model, x


@pytest.mark.parametrize(
    "change",
    [
        lambda model: resnet_fused.fuse(model.layers, backend="cpu"),
        lambda model: resnet_fused.fuse(model.layers[0], precision="fast"),
        lambda model: resnet_fused.unfuse(model.layers[1]),
        lambda model: setattr(model.layers[0], "conv1", nn.Conv2d(8, 8, 3, padding=1, bias=False)),
        lambda model: model.layers.eval(),
        lambda model: model.layers[1].bn2.eval(),
        lambda model: model.layers[0].conv1.weight.requires_grad_(False),
        lambda model: model.layers.__setitem__(0, resnet_fused.fuse(BasicBlock(8, 8), backend="cpu")),
    ],
    ids=["backend", "precision", "unfused", "child", "eval", "norm", "frozen", "block"],
)
def test_what_changes_within_is_asked_again(change):
    model, x = _known_around()
    change(model)
    assert not as_stock.is_known(model, x) and not as_stock.is_known(model.layers, x)


def test_survivors_are_drawn_within_what_was_known():
    torch.manual_seed(0)
    stock = Around()
    stock.layers[1].drop_path = StochasticDepth(0.5)
    model, x = resnet_fused.fuse(copy.deepcopy(stock)), image()
    model(x)
    resnet_fused.fuse(model, drop_path="survivors")
    fresh = resnet_fused.fuse(copy.deepcopy(stock), drop_path="survivors")
    fresh.load_state_dict(model.state_dict())
    for _ in range(4):
        torch.manual_seed(1)
        ours = model(x)
        torch.manual_seed(1)
        assert ours.equal(fresh(x)) and not as_stock.is_known(model, x)


def test_what_is_known_is_not_kept_alive():
    model, _ = _known_around()
    gone = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in gone)
