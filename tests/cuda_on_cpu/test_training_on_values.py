"""Training steps of bottlenecks under ``use("cuda")``, its kernels run on the CPU: 1x1 convolutions on values, forward
and backward by compiled kernels alone."""

from __future__ import annotations

import collections
import copy

import cuda_ops
import on_cpu
import pytest
import torch
from nets import block, observe
from torch import nn

import resnet_fused
from resnet_fused.backends import cuda_conv, soundness
from resnet_fused.plan import choose, devices

pytestmark = on_cpu.needed
OF_GRAM_JOINS = {"conv1x1_join", "conv1x1_wgrad", "gram", "gram_norm"}


@pytest.fixture
def ran():
    """How often each op ran on the backend "cuda": the kernels of csrc/cuda, on tensors that are taken for a GPU's."""
    counts = collections.Counter()
    with cuda_ops.training(counts):
        yield counts


def network():
    """An identity, both kinds of projections, and channels beyond a tile."""
    return nn.Sequential(block(16, 8), block(32, 8), block(32, 24, stride=2)).to(memory_format=torch.channels_last)


def train(stock):
    """What was planned. Output, gradients and running statistics at twice stock's own error, each by name."""
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    stock = stock.bfloat16()
    exact, fused = copy.deepcopy(stock).double(), resnet_fused.fuse(copy.deepcopy(stock))
    x = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    with resnet_fused.use("cuda"), choose.observing() as said:
        got = observe(fused, x)
    want, near = observe(exact, x.double()), observe(stock, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        ours, theirs = ((found[name].double() - value).norm() for found in (got, near))
        assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps * value.double().norm(), name
    return said


def test_bottlenecks_train_on_values(ran):
    said = train(network())
    assert len(said) == 3 and all("on values" in line for line in said), said
    assert ran["conv1x1_dgrad"] == 8  # of each 1x1 convolution
    assert ran.keys() >= {"conv1x1", *OF_GRAM_JOINS}


def test_what_has_too_many_elements_for_a_kernel_is_not_planned_for_it(ran, monkeypatch):
    """Of three blocks the output of the first and the input of the second: the last is on values still."""
    monkeypatch.setattr(cuda_conv, "MOST_ELEMENTS", 4 * 32 * 12 * 12)
    first, *others = network()
    said = train(nn.Sequential(first, others[0], nn.AvgPool2d(2), others[1]))
    assert [line.count("1x1 on values") for line in said] == [0, 0, 1]
    assert ran["conv1x1_dgrad"] == 3 and ran["bn_stats"] > 0


def test_float32_is_on_values_where_it_may_be_rounded_to_tf32(ran, monkeypatch):
    x, found = torch.randn(1, 16, 12, 12), []
    for allowed in (False, True):
        monkeypatch.setattr(soundness.tf32, "allowed", lambda allowed=allowed: allowed)
        found.append([choose.value_device("cuda", t) for t in (x, x.bfloat16())])
    there = devices.DEVICES["h100"]
    assert found == [[None, there], [there, there]]
