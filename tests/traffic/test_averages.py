"""What a transition between dense blocks, and ResNet-D's shortcuts, move, save and start: counted, by hand."""

import pytest
import torch
from torch import nn

import resnet_fused

N, C, K, SIZE = 256, 256, 128, 56


def transition():
    return nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(inplace=True), nn.Conv2d(C, K, 1, bias=False), nn.AvgPool2d(2, 2))


def explained(**options):
    return resnet_fused.explain(transition(), (N, C, SIZE, SIZE), dtype=torch.bfloat16, device="h100", **options).model


def test_a_transition_in_training():
    """In units of x: its pixels averaged are a quarter, and of half the channels an eighth."""
    found, x = explained(), N * C * SIZE * SIZE * 2
    assert found.plan.startswith("norm on load; norm, ReLU and average in one pass; 1x1 on values")
    forward = 1 + (1 + 1 / 4) + (1 / 4 + 1 / 8)  # statistics; averages; convolution
    backward = (1 / 8 + 1 / 4 + 1 / 4) + (1 / 4 + 1) + (1 / 4 + 1 + 1)  # both gradients; sums; what is given
    assert found.fused.bytes == pytest.approx((forward + backward) * x, rel=0.02)
    assert found.fused.bytes < 0.55 * found.stock.bytes
    assert found.fused_saved == pytest.approx((1 + 1 / 4) * x, rel=0.001)
    assert found.stock_saved == pytest.approx((1 + 1 + 1 / 2) * x, rel=0.001)  # x, what the ReLU made, z
    assert found.fused.launches <= found.stock.launches
    products = [o.flops for o in found.fused.operations if "conv1x1" in o.name]
    assert sum(products) == pytest.approx(3 * 2 * N * C * K * (SIZE // 2) ** 2, rel=0.01)


def test_a_transition_in_evaluation():
    found, x = explained(training=False), N * C * SIZE * SIZE * 2
    assert found.plan == "evaluation: norm on load; ReLU and average in one pass; convolution"
    assert found.fused.bytes == pytest.approx((1 + 1 / 4 + 1 / 4 + 1 / 8) * x, rel=0.001)
    assert (found.fused.launches, found.stock.launches) == (3, 4)


def test_a_projection_of_averages_keeps_its_gram_join():
    class Downsampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(256, 128, 1, bias=False), nn.BatchNorm2d(128)
            self.conv2, self.bn2 = nn.Conv2d(128, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128)
            self.conv3, self.bn3 = nn.Conv2d(128, 512, 1, bias=False), nn.BatchNorm2d(512)
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(pool, nn.Conv2d(256, 512, 1, bias=False), nn.BatchNorm2d(512))
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
            out += self.downsample(x)
            return self.relu(out)

    found = resnet_fused.explain(Downsampling(), (64, 256, 56, 56), dtype=torch.bfloat16, device="h100").model
    assert "average; Gram join on values, shortcut Gram join" in found.plan
    assert found.fused_saved < 0.48 * found.stock_saved
