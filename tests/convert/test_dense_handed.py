"""The statistics of what a dense block makes, handed to what follows."""

import pytest
import torch
from dense_blocks import assert_equal, dense_block, fused, images, step
from torch import nn

import resnet_fused
from resnet_fused import library
from resnet_fused.models.preact import PreActBasicBlock
from resnet_fused.steps import batch_norm
from resnet_fused.testing.vision import import_torchvision

needs_kernels = pytest.mark.skipif(not library.status().cpu.loaded, reason="kernels of the compiled library")


@pytest.fixture
def reads(monkeypatch):
    """Channels of every tensor that is read for its statistics alone."""
    found, original = [], batch_norm.normalise
    monkeypatch.setattr(batch_norm, "normalise", lambda z, *rest: found.append(z.shape[1]) or original(z, *rest))
    return found


def followed(*between):
    """A stem, a dense block of 17 channels, modules, and a pre-activation block that begins with a norm."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True)
    return nn.Sequential(*stem, dense_block(), *between, PreActBasicBlock(17, 17)).double()


class WritesOver(nn.Module):
    def forward(self, x):
        return x.clone().mul_(2)


@pytest.mark.parametrize("between", [(), (WritesOver(),)], ids=["next", "apart"])
def test_statistics_reach_the_next_block_alone(reads, between):
    stock = followed(*between)
    model = fused(stock)
    assert_equal(step(model, images(channels=3)), step(stock, images(channels=3)))
    assert reads.count(17) == 1 + len(between)  # its second norm is of as many


def test_a_value_that_two_read_carries_no_statistics(reads):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.block, self.next = *list(followed())[:2], dense_block(), PreActBasicBlock(17, 17)

        def forward(self, x):
            h = self.block(self.bn(self.conv(x)))
            return self.next(h) + h

    torch.manual_seed(0)
    stock = Twice().double()
    model = fused(stock)
    assert_equal(step(model, images(channels=3)), step(stock, images(channels=3)))
    assert reads.count(17) == 2


@needs_kernels
def test_no_activation_of_a_densenet_is_read_for_its_statistics_alone(reads):
    """Blocks write them with what they make, and transitions get them handed; a pool or a stem emits its own."""
    stock = import_torchvision().models.DenseNet(8, (2, 2, 2), 16, num_classes=5)
    model = fused(stock, backend="auto")
    model(torch.randn(4, 3, 64, 64))
    assert [channels for channels in reads if channels in (32, 40)] == []
    resnet_fused.unfuse(model.features.denseblock1)
    model(torch.randn(4, 3, 64, 64))
    assert reads.count(32) == 1
