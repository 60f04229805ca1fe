"""What changes between calls is planned for, whatever steps were kept."""

import copy

import torch
from nets import observe
from preact_blocks import plan_of
from torch import nn

import resnet_fused
from resnet_fused.models import Bottleneck


def test_a_bias_that_comes_later_is_planned_for():
    """A Gram join takes none."""
    torch.manual_seed(0)
    block, x = Bottleneck(16, 4).train(), torch.randn(4, 16, 6, 6)
    fused = resnet_fused.fuse(copy.deepcopy(block))
    assert any("Gram join" in text for text in plan_of(copy.deepcopy(fused), x))
    bias = torch.randn(16)
    for side in (fused, block):
        side(x)
        side.conv3.bias = nn.Parameter(bias.clone())
    got, want = observe(fused, x), observe(block, x)
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
