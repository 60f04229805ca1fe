"""Dense networks are torchvision's and the paper's: same names, same start, same outputs and gradients."""

import pytest
import torch

from resnet_fused import models
from resnet_fused.testing.vision import import_torchvision

PARAMETERS = {  # from torchvision's and the paper's tables
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet_bc100_k12": 769_162,
    "densenet_bc190_k40": 25_624_430,
}


def meta(builder, **options):
    with torch.device("meta"):
        return builder(**options)


def shapes(model):
    return [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]


def test_all_are_here():
    assert sorted(PARAMETERS) == sorted(name for name in models.BUILDERS if name.startswith("densenet"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert sum(p.numel() for p in meta(models.BUILDERS[name]).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in PARAMETERS if "_" not in name])
def test_state_dict_of_torchvision(name):
    theirs = import_torchvision().models
    for options in ({}, {"num_classes": 7, "bn_size": 2}):
        assert shapes(meta(models.BUILDERS[name], **options)) == shapes(meta(getattr(theirs, name), **options))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory_efficient", [True, False])
def test_same_numbers_as_torchvision(training, memory_efficient):
    sizes = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8, "bn_size": 2, "num_classes": 5}
    results = []
    for kind in (models.DenseNet, import_torchvision().models.DenseNet):
        torch.manual_seed(3)
        model = kind(**sizes, memory_efficient=memory_efficient, drop_rate=0.2)
        model.train(training)
        x = torch.randn(2, 3, 32, 32, requires_grad=True)
        out = model(x)
        out.square().sum().backward()
        results.append({"out": out, "x": x.grad} | dict(model.named_buffers()))
        results[-1] |= {key: p.grad for key, p in model.named_parameters()}
    ours, expected = ({key.replace("norm3", "norm5"): value for key, value in found.items()} for found in results)
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, msg=key)


@pytest.mark.parametrize("depth", [4, 99, 101])
def test_depths_that_the_family_does_not_have(depth):
    with pytest.raises(ValueError, match="6n \\+ 4"):
        models.DenseNetCifar(depth, 12)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("build", [models.densenet121, models.densenet_bc100_k12])
def test_dropout_of_a_rate_that_is_no_probability(build, rate):
    with pytest.raises(ValueError, match=f"drop_rate must be in \\[0, 1\\], got {rate}"):
        build(drop_rate=rate)


def test_small_images():
    model = models.DenseNetCifar(16, 4)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert model.features(torch.randn(2, 3, 32, 32)).shape[2:] == (8, 8)
