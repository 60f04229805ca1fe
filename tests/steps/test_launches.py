"""How many kernels a block starts on a GPU, as `explain` counts them."""

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.models.resnet import Bottleneck

#: Channels, size of the image -> launches. Where both sides are wide, the first convolution's gradients are two passes.
LAYERS = {(256, 56): 23, (512, 28): 23, (1024, 14): 25, (2048, 7): 25}


@pytest.mark.parametrize("channels, size", LAYERS)
def test_an_identity_bottleneck(channels, size):
    model = nn.Sequential(nn.Conv2d(channels, channels, 1), Bottleneck(channels, channels // 4))
    model = model.to(memory_format=torch.channels_last)  # as a GPU is trained: else a copy of the 3x3's gradient more
    shape = (256, channels, size, size)
    (block,) = resnet_fused.explain(model, shape, dtype=torch.bfloat16, device="h100").blocks
    names = [operation.name for operation in block.fused.operations]
    assert block.fused.launches <= LAYERS[channels, size], names
    assert not {"bn_affine", "bn_coefficients", "aten::_to_copy"} & set(names)
    assert names.count("running_update") == 1
