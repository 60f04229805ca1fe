"""What a block returns, and what its stock calls take, is any structure of values."""

import copy

import pytest
import torch
from nets import images
from torch import nn

import resnet_fused
from resnet_fused.plan import choose


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()


class Pair(Block):
    def forward(self, x):
        out = self.relu(self.bn(self.conv(x)))
        return out, x


class Named(Block):
    def forward(self, x):
        out = self.relu(self.bn(self.conv(x)))
        return {"out": out, "all": [out, (x, 1)]}


class Nothing(Block):
    def forward(self, x):
        self.relu(self.bn(self.conv(x)))


class Joined(Block):
    def forward(self, x):
        return torch.cat([self.relu(self.bn(self.conv(x))), x], dim=1)


class Sliced(Block):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))[:, : x.size(1)] + x


@pytest.mark.parametrize("kind", [Pair, Named, Nothing, Joined, Sliced])
@pytest.mark.parametrize("compiled", [False, True])
def test_structures_are_as_in_stock(kind, compiled):
    torch.manual_seed(0)
    stock = kind().double()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    assert resnet_fused.report(fused).fused
    run = torch.compile(fused, backend="eager", fullgraph=True) if compiled else fused
    with choose.fusing_all():
        got, want = run(images().double()), stock(images().double())
    assert type(got) is type(want)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused.bn.running_var, stock.bn.running_var, rtol=1e-9, atol=1e-9)


def test_a_stage_of_blocks_that_cannot_take_pairs_raises_as_in_stock():
    torch.manual_seed(0)
    stock = nn.Sequential(Pair(), Pair()).double()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        with pytest.raises(TypeError):
            model(images().double())
