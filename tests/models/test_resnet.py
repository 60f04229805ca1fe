"""The models are torchvision's: same names, same start, same outputs and gradients."""

import functools

import pytest
import torch
from architectures import meta
from torch import nn

from resnet_fused import models
from resnet_fused.testing.vision import import_torchvision

PARAMETERS = {  # millions, from the papers' and torchvision's tables
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}


@pytest.fixture
def theirs():
    try:
        return import_torchvision().models
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import: {error}")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert sum(p.numel() for p in meta(models.BUILDERS[name]).parameters()) == PARAMETERS[name]


def shapes(model):
    return [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("options", [{}, {"num_classes": 7, "zero_init_residual": True}], ids=["default", "options"])
def test_state_dict_of_torchvision(theirs, name, options):
    assert shapes(meta(models.BUILDERS[name], **options)) == shapes(meta(getattr(theirs, name), **options))


CASES = {
    "resnet18": {"num_classes": 5},
    "resnet50": {"num_classes": 5, "zero_init_residual": True},
    "resnet50-dilated": {"num_classes": 5, "replace_stride_with_dilation": (False, True, True)},
    "resnext50_32x4d": {"num_classes": 5},
    "wide_resnet50_2": {"num_classes": 5},
    "resnet50-norm": {"num_classes": 5, "norm_layer": functools.partial(nn.BatchNorm2d, momentum=0.3, eps=1e-3)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_numbers_as_torchvision(theirs, case, training):
    name, options = case.split("-")[0], CASES[case]
    results = []
    for builders in (models, theirs):
        torch.manual_seed(3)
        model = getattr(builders, name)(**options).train(training)
        x = torch.randn(2, 3, 64, 64, requires_grad=True)
        out = model(x)
        out.square().sum().backward()
        grads = {key: p.grad for key, p in model.named_parameters()}
        results.append({"out": out, "x": x.grad} | grads | dict(model.named_buffers()))
    ours, expected = results
    assert ours.keys() == expected.keys()
    for key in expected:  # the same start, so the same operations; only parallel summation may differ
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_state_dict_loads_both_ways(theirs):
    ours, other = models.resnet18(num_classes=3), theirs.resnet18(num_classes=3)
    ours.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(models.resnet18(num_classes=3).state_dict(), strict=True)


def test_blocks_have_torchvisions_signature(theirs):
    import inspect

    for name in ("BasicBlock", "Bottleneck"):
        ours, other = getattr(models, name), getattr(theirs.resnet, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(other).parameters)
        assert ours.expansion == other.expansion


@pytest.mark.parametrize("options", [{"groups": 2}, {"base_width": 128}])
def test_basic_block_refuses_width_and_groups(options):
    with pytest.raises(ValueError, match="groups=1 and base_width=64"):
        models.BasicBlock(64, 64, **options)


def test_basic_block_refuses_dilation():
    with pytest.raises(NotImplementedError, match="Dilation > 1"):
        models.BasicBlock(64, 64, dilation=2)


def test_dilation_needs_three_elements():
    with pytest.raises(ValueError, match="3-element tuple, got \\(True,\\)"):
        models.resnet50(replace_stride_with_dilation=(True,))


def test_zero_init_makes_blocks_their_shortcut():
    block = models.resnet50(zero_init_residual=True).layer1[1].eval()
    x = torch.randn(1, 256, 4, 4)
    torch.testing.assert_close(block(x), torch.relu(x))


def test_channels_last_stays_channels_last():
    model = models.resnet18().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    assert model.layer1(model.maxpool(model.bn1(model.conv1(x)))).is_contiguous(memory_format=torch.channels_last)
