"""Whole models in evaluation by the CUDA kernels, run on the CPU: twice stock's error, and one call a block."""

from __future__ import annotations

import collections
import copy

import cuda_ops
import on_cpu
import pytest
import torch
from nets import thin
from torch import nn

import resnet_fused
from resnet_fused.backends import backends
from resnet_fused.models import resnet18, resnet50, wide_resnet50_2
from resnet_fused.models.resnet import BasicBlock, Bottleneck

pytestmark = on_cpu.needed


@pytest.fixture
def ran(monkeypatch):
    """How often each op of the emulated backend "cuda" ran."""
    counts = collections.Counter()
    with cuda_ops.emulated():
        kernels = backends()["cuda"].kernels
        for name, kernel in cuda_ops.counted(kernels, counts).items():
            monkeypatch.setitem(kernels, name, kernel)
        yield counts


@pytest.mark.parametrize("make", [resnet18, resnet50, wide_resnet50_2])
def test_a_model_is_as_exact_as_stock(ran, make):
    stock = thin(make(num_classes=4), 8).eval()
    exact, fused = copy.deepcopy(stock).double(), resnet_fused.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad(), resnet_fused.use("cuda"):
        got = fused(x)
    with torch.no_grad():
        want, near = exact(x.double()), stock(x)
    ours, theirs = ((found.double() - want).norm() for found in (got, near))
    assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps * want.norm()
    blocks = [module for module in fused.modules() if isinstance(module, BasicBlock | Bottleneck)]
    assert ran == {"conv_chain": len(blocks), "conv_norm_add_relu": 1}  # the stem's


def test_a_call_that_is_repeated_is_one_call_of_the_dispatcher(ran):
    """Of the sixth and later of a form: see backends/tape.py."""
    torch.manual_seed(0)
    block = resnet_fused.fuse(thin(nn.Sequential(Bottleneck(256, 64)), 16).eval())
    x = torch.randn(1, 16, 6, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), resnet_fused.use("cuda"):
        results = [block(x) for _ in range(5)]
        counts = dict(ran)
        results += [block(x) for _ in range(3)]
    assert counts == {"conv_chain": 5} and all(torch.equal(one, results[0]) for one in results)
