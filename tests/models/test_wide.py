"""Wide Residual Networks: the paper's sizes; their block is the pre-activation one with dropout in the middle."""

import pytest
import torch
from architectures import meta, normal, scattered
from torch import nn

from resnet_fused import models
from resnet_fused.models import PreActBasicBlock, WideBlock, WideResNet

PARAMETERS = {"wrn28_10": 36_479_194, "wrn16_8": 10_961_370, "wrn40_4": 8_949_210}  # the paper: 36.5, 11.0 and 8.9 M


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_depth_and_shapes(name):
    model = meta(models.BUILDERS[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    depth, widening = map(int, name.removeprefix("wrn").split("_"))
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == depth  # its projections are layers of the name
    seen = []
    model.layer3.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    assert seen == [(2, 64 * widening, 8, 8)]


@pytest.mark.parametrize("projects", [False, True])
def test_block_with_dropout(projects):
    """The dropout's input and output are the second norm's and the second convolution's; the rest is the base class."""
    channels = 4 if projects else 6
    downsample = nn.Conv2d(channels, 6, 1, stride=2, bias=False) if projects else None
    stride = 2 if projects else 1
    block = scattered(WideBlock(channels, 6, stride, downsample, dropout_rate=0.5))
    base = PreActBasicBlock(channels, 6, stride, downsample).double()
    base.load_state_dict(block.state_dict(), strict=True)
    x = normal(3, channels, 6, 6)
    torch.testing.assert_close(block.eval()(x), base.eval()(x))
    seen = {}
    block.train().dropout.register_forward_hook(lambda m, args, out: seen.update(before=args[0].clone(), behind=out))
    block.conv2.register_forward_pre_hook(lambda m, args: seen.update(conv2=args[0]))
    block(x)
    assert seen["conv2"] is seen["behind"] and seen["before"].min() == 0
    kept = seen["behind"] != 0
    torch.testing.assert_close(seen["behind"][kept], 2 * seen["before"][kept])
    assert 0.2 < kept.double().mean() / (seen["before"] > 0).double().mean() < 0.8


def test_dropout_is_in_every_block_or_absent():
    model = WideResNet(10, 1, 0.3)
    assert [block.dropout.p for block in model.modules() if isinstance(block, WideBlock)] == [0.3] * 3
    assert not any(isinstance(m, nn.Dropout) for m in WideResNet(10, 1).modules())
    assert list(WideResNet(10, 1).state_dict()) == list(model.state_dict())


def test_shortcut_of_an_unchanged_shape_is_the_stem_itself():
    model = WideResNet(10, 1)
    assert model.layer1[0].downsample is None and WideResNet(10, 2).layer1[0].downsample is not None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((29, 10), "6n \\+ 4, one of 10, 16, 22, 28, 34, 40, ..., got 29"),
        ((4, 1), "got 4"),
        ((28, 0), "widen_factor must be at least 1, got 0"),
        ((28, 10, 1.5), "dropout_rate must be in \\[0, 1\\], got 1.5"),
    ],
)
def test_errors(arguments, told):
    with pytest.raises(ValueError, match=told):
        WideResNet(*arguments)
