"""What `explain` counts of training steps in which every convolution is on values, planned for an H100."""

import pytest
import torch
from nets import BasicBlock, block
from torch import nn

import resnet_fused
from resnet_fused.models import resnet18, resnet50
from resnet_fused.testing.vision import import_torchvision


@pytest.mark.parametrize(("kind", "megabytes", "launches"), [(resnet18, 68, 200), (resnet50, 184, 422)])
def test_training_moves_less_where_every_convolution_is_on_values(kind, megabytes, launches):
    """As a GPU with the compiled convolution is planned for; nothing is read for its statistics alone."""
    explained = resnet_fused.explain(kind(), (256, 3, 224, 224), dtype=torch.bfloat16, device="h100")
    assert explained.model.fused.bytes <= megabytes * 1e6 * 256 and explained.model.fused.launches <= launches
    assert all("convolution on values" in block.plan for block in explained.blocks)
    assert "conv_values" in {operation.name for operation in explained.model.fused.operations}


def test_a_basic_block_takes_18_launches():
    """Forward and backward: statistics come with convolutions, coefficients with sums, masks with what reads."""
    model = nn.Sequential(block(64, 64, kind=BasicBlock)).to(memory_format=torch.channels_last)
    (only,) = resnet_fused.explain(model, (256, 64, 56, 56), dtype=torch.bfloat16, device="h100").blocks
    assert only.fused.launches <= 18 < only.stock.launches


def test_a_b200_moves_more_where_a_library_multiplies_faster():
    """There no convolution of several taps is on values: what `mma.sync` reaches would take longer than the passes."""
    model = nn.Sequential(block(64, 64, kind=BasicBlock)).to(memory_format=torch.channels_last)
    found = [
        resnet_fused.explain(model, (256, 64, 56, 56), dtype=torch.bfloat16, device=name).model.fused
        for name in ("a100", "h100", "b200")
    ]
    assert [sum(o.name == "conv_values" for o in each.operations) for each in found] == [2, 2, 0]
    assert found[2].bytes > found[1].bytes == found[0].bytes


def test_squeeze_excite_saves_less_where_memory_is_preferred():
    """As a CPU plans it: what a gate reads is made again. By speed 0.66 is saved."""
    import_torchvision()
    timm = pytest.importorskip("timm")
    model = resnet_fused.fuse(timm.create_model("seresnet50"), prefer="memory")
    explained = resnet_fused.explain(model, (16, 3, 224, 224)).model
    assert explained.fused_saved <= 0.42 * explained.stock_saved
