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


def frozen(kind):
    """torchvision's model of the name, with norms whose parameters are fixed too, in 16 bits as they are."""
    vision = import_torchvision()
    return getattr(vision.models, kind)(norm_layer=vision.ops.misc.FrozenBatchNorm2d).bfloat16()


@pytest.mark.parametrize(("kind", "megabytes", "launches"), [("resnet18", 47, 137), ("resnet50", 144, 366)])
def test_training_moves_less_where_norms_are_frozen(kind, megabytes, launches):
    """Each convolution of a block writes what is behind its norm, and nothing else is written forward."""
    explained = resnet_fused.explain(frozen(kind), (256, 3, 224, 224), dtype=torch.bfloat16, device="h100").model
    assert explained.fused.bytes <= megabytes * 1e6 * 256 and explained.fused.launches <= launches
    ran = {operation.name for operation in explained.fused.operations}
    assert "conv_join" in ran and ran.isdisjoint({"norm_add_relu", "conv1x1", "conv_values"})


@pytest.mark.parametrize(
    ("name", "inputs", "megabytes", "launches"), [("BasicBlock", 64, 8.2, 11), ("Bottleneck", 256, 16.1, 20)]
)
def test_blocks_with_frozen_norms(name, inputs, megabytes, launches):
    """A block's input and its gradient are counted too."""
    vision = import_torchvision()
    kind, norm = getattr(vision.models.resnet, name), vision.ops.misc.FrozenBatchNorm2d
    model = nn.Sequential(nn.Conv2d(inputs, inputs, 1), kind(inputs, 64, norm_layer=norm))
    model = model.to(torch.bfloat16, memory_format=torch.channels_last)
    (only,) = resnet_fused.explain(model, (256, inputs, 56, 56), dtype=torch.bfloat16, device="h100").blocks
    assert only.fused.bytes <= megabytes * 1e6 * 256 and only.fused.launches <= launches
    assert only.plan.endswith("convolution with frozen norm, sum, ReLU (running statistics)")


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
