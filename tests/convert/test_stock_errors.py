"""What stock refuses, a fused block refuses."""

import copy

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.convert.fused_module import FusedModule


class AddsInPlace(nn.Module):
    """A block whose main branch is smaller than what is added to it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, (5, 1), bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += x
        return self.relu(y)


class Adds(AddsInPlace):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


def fused_block(kind, training):
    stock = kind().train(training)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    assert isinstance(fused, FusedModule)
    return stock, fused


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_adding_in_place_does_not_broadcast_the_result(grad, training):
    x = torch.randn(2, 8, 5, 7)
    with torch.set_grad_enabled(grad):
        for model in fused_block(AddsInPlace, training):
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                model(x)


@pytest.mark.parametrize("training", [True, False])
def test_adding_broadcasts(training):
    stock, fused = fused_block(Adds, training)
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(fused(x), stock(x))
