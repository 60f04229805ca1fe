"""Training steps of blocks with frozen norms under ``use("cuda")``, its kernels run on the CPU: forward one launch for
each convolution, and nothing is normalised on load or in a pass."""

from __future__ import annotations

import collections
import copy

import cuda_ops
import on_cpu
import pytest
import torch
from nets import BasicBlock, Bottleneck, block, observe
from torch import nn

import resnet_fused
from resnet_fused.models import StochasticDepth
from resnet_fused.plan import choose

pytestmark = on_cpu.needed
KINDS = {Bottleneck: ((16, 8, 1), (32, 8, 1), (32, 24, 2)), BasicBlock: ((16, 16, 1), (16, 40, 2), (40, 40, 1))}


@pytest.fixture
def ran():
    """How often each op ran on the backend "cuda": the kernels of csrc/cuda, on tensors that are taken for a GPU's."""
    counts = collections.Counter()
    with cuda_ops.training(counts):
        yield counts


def network(kind, trained):
    """Blocks with norms as after some training, whose own parameters are `trained` or not; the last drops samples."""
    blocks = [block(*sizes, kind=kind) for sizes in KINDS[kind]]
    blocks[-1].drop_path = StochasticDepth(0.5)
    stock = nn.Sequential(*blocks).to(memory_format=torch.channels_last)
    for norm in stock.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for t in (norm.weight, norm.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
            for t in (norm.bias, norm.running_mean):
                nn.init.normal_(t, 0, 0.3)
            norm.eval().requires_grad_(trained)
    return stock


@pytest.mark.parametrize("trained", [False, True], ids=["parameters fixed", "parameters trained"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_train_with_frozen_norms(ran, kind, trained):
    """Output and gradients at twice stock's own error, each by name; within an ulp or so."""
    stock = network(kind, trained).bfloat16()
    exact, fused = copy.deepcopy(stock).double(), resnet_fused.fuse(copy.deepcopy(stock))
    x = torch.randn(6, 16, 12, 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    with resnet_fused.use("cuda"), choose.observing() as said:
        got = observe(fused, x)
    assert len(said) == 3 and all(line.endswith("sum, ReLU (running statistics)") for line in said)
    want, near = observe(exact, x.double()), observe(stock, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        ours, theirs = ((found[name].double() - value).norm() for found in (got, near))
        assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps * value.double().norm(), name
    convolutions = [module for module in stock.modules() if isinstance(module, nn.Conv2d)]
    if kind is Bottleneck:  # a projection is part of the launch that adds it
        assert (ran["conv1x1_join"], ran["conv_join"]) == (2 * 3, 3) and ran["conv1x1_dgrad"] == len(convolutions) - 3
    else:
        assert ran["conv_join"] == len(convolutions) and not ran["conv1x1_join"]
    assert ran.keys().isdisjoint({"norm_add_relu", "conv1x1", "conv_values", "bn_stats", "gram"})
