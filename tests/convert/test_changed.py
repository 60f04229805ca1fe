"""What users change on a model after `fuse`: it runs as stock would, `report` tells, `fuse` again takes it in."""

import copy
import types

import pytest
import torch
from nets import BasicBlock, assert_same, block, images, observe, pair, small_resnet
from torch import nn

import resnet_fused


def clamp(self, x):
    return x.clamp(0, 0.1)


def negate(self, x, weight, bias):
    return -nn.functional.conv2d(x, weight, bias, self.stride, self.padding)


def remove_shortcut(b):
    del b.downsample


CHANGES = {
    "relu to GELU": lambda b: setattr(b, "relu", nn.GELU()),
    "relu to Identity": lambda b: setattr(b, "relu", nn.Identity()),
    "bn2 to Identity": lambda b: setattr(b, "bn2", nn.Identity()),
    "bn2 to GroupNorm": lambda b: setattr(b, "bn2", nn.GroupNorm(2, 8)),
    "shortcut to a convolution": lambda b: setattr(b, "downsample", nn.Conv2d(8, 32, 1)),
    "shortcut longer": lambda b: b.downsample.append(nn.ReLU()),
    "shortcut's norm": lambda b: b.downsample.__setitem__(1, nn.Identity()),
    "shortcut's forward": lambda b: setattr(b.downsample, "forward", lambda x: x.repeat(1, 4, 1, 1)),
    "conv1 shared with another geometry": lambda b: setattr(b.conv1, "stride", 1),
    "conv2 wider": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 5, padding=2)),
    "relu's forward": lambda b: setattr(b.relu, "forward", types.MethodType(clamp, b.relu)),
    "conv2's _conv_forward": lambda b: setattr(b.conv2, "_conv_forward", types.MethodType(negate, b.conv2)),
    "conv1's forward": lambda b: setattr(b.conv1, "forward", lambda x: x * 2),
    "bn1's _check_input_dim": lambda b: setattr(b.bn1, "_check_input_dim", lambda x: x.detach().mul_(2)),
    "bn1's forward": lambda b: setattr(b.bn1, "forward", lambda x: x * 2),
    "the block's own forward": lambda b: setattr(b, "forward", lambda x: b.conv1(x)),
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_are_followed(change, when):
    stock = block(8, 8, 1)
    stock.downsample = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32))
    stock = stock.double()
    fused = copy.deepcopy(stock)
    if when == "after":
        resnet_fused.fuse(fused)
    for model in (stock, fused):
        torch.manual_seed(5)
        CHANGES[change](model)
        model.double()
    if when == "before":
        resnet_fused.fuse(fused)
    x = images().double()
    for training in (True, False):
        want, got = observe(stock.train(training), x), observe(fused.train(training), x)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    str(resnet_fused.report(fused))
    resnet_fused.fuse(fused)  # whatever was changed, it can be said again
    assert_same(observe(fused, x), observe(stock, x), 1e-7, 1e-7)


def test_a_child_removed_raises_as_in_stock():
    stock, fused = pair(block(8, 8, 2))
    for model in (stock, fused):
        remove_shortcut(model)
        with pytest.raises(AttributeError, match="downsample"):
            model(images())
    assert "downsample" in str(resnet_fused.report(fused)) or "changed" in str(resnet_fused.report(fused))


def test_attributes_that_no_forward_reads_leave_a_block_fused():
    model = resnet_fused.fuse(small_resnet())
    before = len(resnet_fused.report(model).fused)
    for name, module in model.named_modules():
        module.my_name, module.flops, module._fsdp_use_orig_params = name, 12, True
    model.layer1[0].register_full_backward_hook(lambda *args: None).remove()
    assert len(resnet_fused.report(model).fused) == before


class Switched(BasicBlock):
    """A forward that reads constants of its instance and of its class."""

    skip, scale = True, "none"

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.skip:
            out = out + x
        return self.relu(out)


def test_constants_that_a_forward_reads_are_followed():
    stock, fused = pair(Switched(8, 8))
    assert resnet_fused.report(fused).fused
    for value in (False, 0, True):
        stock.skip = fused.skip = value
        assert_same(observe(fused, images()), observe(stock, images()), 1e-4, 1e-4)
    fused.skip = False
    assert resnet_fused.report(fused).left
    assert resnet_fused.report(resnet_fused.fuse(fused)).fused
    stock.skip = False
    assert_same(observe(fused, images()), observe(stock, images()), 1e-4, 1e-4)


def test_a_constant_of_the_class(monkeypatch):
    stock, fused = pair(Switched(8, 8))
    monkeypatch.setattr(Switched, "skip", False)
    assert_same(observe(fused, images()), observe(stock, images()), 1e-4, 1e-4)


def test_a_forward_replaced_on_the_class(monkeypatch):
    stock, fused = pair(Switched(8, 8))
    monkeypatch.setattr(Switched, "forward", lambda self, x: self.bn1(self.conv1(x)))
    assert_same(observe(fused, images()), observe(stock, images()), 0, 0)
    assert "call fuse() again" in resnet_fused.report(fused).left[0].reason


class Named(nn.Module):
    """The argument has another name, and a default."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, input=None):
        return self.relu(self.bn(self.conv(input)))


def test_calls_by_keyword():
    stock, fused = pair(Named())
    assert resnet_fused.report(fused).fused
    x = images(channels=3)
    torch.testing.assert_close(fused(input=x), stock(input=x), rtol=1e-4, atol=1e-5)
    for model in (stock, fused):
        with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
            model(x=x)
        with pytest.raises(TypeError):
            model()
