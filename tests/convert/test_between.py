"""Modules that stand within a chain and are called before it: what may write to the chain's input by now."""

import copy

import pytest
import torch
from nets import images
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.plan import choose


class Pooled(nn.Module):
    """A block whose shortcut is a Sequential that is called between the chain's nodes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Sequential(nn.MaxPool2d(3, 1, 1)))

    def forward(self, x):
        out = self.bn(self.conv(x))
        out += self.down(x)
        return F.relu(out)


def _doubles(module, args):
    args[0].mul_(2)


def _hook(model, monkeypatch):
    model.down[0][0].register_forward_pre_hook(_doubles)


def _patch_class(model, monkeypatch):
    forward = nn.MaxPool2d.forward
    monkeypatch.setattr(nn.MaxPool2d, "forward", lambda self, x: forward(self, x.mul_(2)))


def _patch_instance(model, monkeypatch):
    forward = model.down[0][0].forward
    model.down[0][0].forward = lambda x: forward(x.mul_(2))


@pytest.mark.parametrize("change", [_hook, _patch_class, _patch_instance])
@torch.no_grad()
def test_a_module_within_a_chain_that_writes_to_its_input_by_now(change, monkeypatch):
    torch.manual_seed(0)
    stock = Pooled().double()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    assert resnet_fused.report(fused).fused
    for model in (stock, fused):
        with monkeypatch.context() as patched:
            change(model, patched)
            given = images().double()
            with choose.fusing_all():
                out = model(given)
        if model is stock:
            want, buffers, left = out, {n: b.clone() for n, b in stock.named_buffers()}, given
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(given, left)
    for name, buffer in fused.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-9, atol=1e-9)
