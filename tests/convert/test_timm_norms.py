"""timm's batch norm with an activation inside, in the states that users bring about."""

import copy
import types

import pytest
from activated import assert_same, image, pair
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.testing.vision import import_torchvision

try:
    import_torchvision()
    from timm.layers import norm_act
except ImportError as error:
    pytest.skip(f"timm or torchvision is not installed: {error}", allow_module_level=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 1), norm_act.BatchNormAct2d(8, act_layer=nn.SiLU)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1), norm_act.BatchNormAct2d(6, apply_act=False)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("child", ["drop", "act"])
def test_a_child_that_is_lost_raises_as_in_stock(child, again):
    fused, stock = pair(Block())
    assert_same(fused, stock, image(), runs=1)
    for model in (fused, stock):
        setattr(model.bn1, child, None)
    if again:
        resnet_fused.fuse(fused)
    for model in (fused, stock):
        with resnet_fused.use("cpu"), pytest.raises(TypeError, match="'NoneType' object is not callable"):
            model(image())


class _Doubled(types.SimpleNamespace):
    """``torch.nn.functional`` with another batch norm."""

    def __getattr__(self, name):
        return getattr(F, name)


def test_functions_that_its_module_finds_under_another_name(monkeypatch):
    fused, stock = pair(Block())
    assert_same(fused, stock, image(), runs=1)
    doubled = _Doubled(batch_norm=lambda *args, **kwargs: 2 * F.batch_norm(*args, **kwargs))
    monkeypatch.setattr(norm_act, "F", doubled)
    assert_same(fused, stock, image(), runs=0)
    assert_same(resnet_fused.fuse(copy.deepcopy(stock)), copy.deepcopy(stock), image())
    monkeypatch.undo()
    assert_same(fused, stock, image(), runs=1)
