"""Norms whose parameters are buffers, under autocast: what they give is as wide as the buffers."""

import copy

import pytest
import torch

import resnet_fused
from resnet_fused.testing.vision import import_torchvision

vision = import_torchvision()
NORM = vision.ops.misc.FrozenBatchNorm2d


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_as_stock(kind, training, grad):
    """At every call, also where a tape would repeat it; without autocast the block is fused before and after."""
    block = getattr(vision.models.resnet, kind)
    torch.manual_seed(0)
    stock = block(64, 64 // block.expansion, norm_layer=NORM).to(memory_format=torch.channels_last).train(training)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    x = torch.randn(4, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    for _ in range(7):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fused(x), stock(x))
            with torch.autocast("cpu", torch.bfloat16):
                got, want = fused(x), stock(x)
        assert got.dtype == want.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_buffers_of_the_dtype_of_autocast_are_fused():
    torch.manual_seed(0)
    stock = vision.models.resnet.BasicBlock(64, 64, norm_layer=NORM).to(torch.bfloat16)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), torch.randn(4, 64, 14, 14, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fused(x), stock(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
