"""What evaluation writes over, and in pieces: what is known of the memory's old content, and random draws."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.testing.vision import import_torchvision

import_torchvision()
layers = pytest.importorskip("timm.layers", reason="needs timm for its drop path")


class Wide(nn.Module):
    """A convolution that oneDNN runs, which notes the bound of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(64, 64, 5, 1, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Pointwise(nn.Module):
    """A residual block of 1x1 convolutions alone."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 64, 1)
        self.bn2, self.drop, self.relu = nn.BatchNorm2d(64), drop, nn.ReLU()

    def forward(self, x):
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.drop(branch) + x)


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("drop", [nn.Identity, lambda: layers.DropPath(0.1)], ids=["plain", "drop path"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@torch.no_grad()
def test_what_was_known_of_a_sum_that_is_written_over_is_forgotten(drop, value):
    torch.manual_seed(0)
    stock = nn.Sequential(Wide(), Pointwise(drop()), Wide()).eval().to(memory_format=torch.channels_last)
    stock[1].conv2.weight[5] = value
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), channels_last(4, 64, 28, 28)
    for _ in range(3):
        wanted, got = stock(x), fused(x)
        assert wanted.isnan().any()
        assert torch.equal(got.isnan(), wanted.isnan())


@torch.no_grad()
def test_drop_paths_draw_as_stock_at_any_batch():
    """A large batch runs in pieces, unless one draws: stock draws for all images, block by block."""
    stock = nn.Sequential(*(Pointwise(layers.DropPath(0.5)) for _ in range(2))).to(memory_format=torch.channels_last)
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), channels_last(48, 64, 56, 56)
    torch.manual_seed(1)
    wanted = stock(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-4)


FIRST = """
import torch
from torch import nn
import resnet_fused
block = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = block
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))
stock = nn.Sequential(Two()).eval().to(memory_format=torch.channels_last)
fused, x = resnet_fused.fuse(stock), torch.randn(4, 64, 56, 56).contiguous(memory_format=torch.channels_last)
with torch.no_grad():
    out = torch.compile(fused, backend="aot_eager")(x)
    torch.testing.assert_close(out, stock(x), rtol=1e-4, atol=1e-4)
"""


def test_a_graph_may_be_the_first_call_of_a_process():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FIRST], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
