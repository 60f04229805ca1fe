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
from resnet_fused.backends import soundness
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


def test_bottlenecks_train_on_values(ran):
    """Output, gradients and running statistics at twice stock's own error, each by name; within an ulp or so."""
    stock = network()
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
    assert len(said) == 3 and all("on values" in line for line in said), said
    want, near = observe(exact, x.double()), observe(stock, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        ours, theirs = ((found[name].double() - value).norm() for found in (got, near))
        assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps * value.double().norm(), name
    assert ran["conv1x1_dgrad"] == 8  # of each 1x1 convolution
    assert ran.keys() >= {"conv1x1", *OF_GRAM_JOINS}


def test_float32_is_on_values_where_it_may_be_rounded_to_tf32(ran, monkeypatch):
    x, found = torch.randn(1, 16, 12, 12), []
    for allowed in (False, True):
        monkeypatch.setattr(soundness.tf32, "allowed", lambda allowed=allowed: allowed)
        found.append([choose.value_device("cuda", t) for t in (x, x.bfloat16())])
    there = devices.DEVICES["h100"]
    assert found == [[None, there], [there, there]]
