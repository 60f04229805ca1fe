"""The networks for small images: the papers' sizes and formulas."""

import functools
import re

import pytest
import torch
from architectures import meta, normal, scattered
from torch import nn
from torch.nn import functional as F

from resnet_fused import models
from resnet_fused.bench import named
from resnet_fused.models import BasicBlock, CifarPlainNet, CifarResNet, PaddedShortcut, PlainBlock

PARAMETERS = {  # He et al. 2015, table 6: 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 M; Xie et al. 2016: 34.4 and 68.1 M
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet1202": 19_421_274,
    "resnext29_8x64d": 34_426_698,
    "resnext29_16x64d": 68_155_210,
    "plain20": 269_722,
    "plain32": 464_154,
    "plain44": 658_586,
    "plain56": 853_018,
    "plain18": 11_689_512 - 172_032 - 2 * 896,  # resnet18 without its projections and their norms
    "plain34": 21_797_672 - 172_032 - 2 * 896,
}


def depth(model):
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sum("downsample" not in name for name in layers)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_depth_and_shapes(name):
    model = meta(models.BUILDERS[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert depth(model) == int(re.search(r"\d+", name)[0])
    large = name in ("plain18", "plain34")
    edge, classes = (224, 1000) if large else (32, 10)
    assert named.input_size(model) == edge and model.fc.out_features == classes
    if name == "resnet1202":
        return  # its 600 blocks are those of the others
    seen = []
    (model.layer4 if large else model.layer3).register_forward_hook(lambda m, args, out: seen.append(out.shape[1:]))
    assert model(torch.empty(2, 3, edge, edge, device="meta")).shape == (2, classes)
    assert seen == [(512, 7, 7) if large else (1024 if "next" in name else 64, 8, 8)]


def test_resnext_groups():
    block = meta(models.resnext29_16x64d).layer2[0]
    assert (block.conv2.groups, block.conv2.in_channels, block.conv3.out_channels) == (16, 2048, 512)
    assert block.conv1.stride == (1, 1) and block.conv2.stride == block.downsample[0].stride == (2, 2)


def norm(state, name, x, training):
    running = None if training else [state[f"{name}.running_{which}"] for which in ("mean", "var")]
    mean, var = running or (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
    scaled = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"].view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1)


def network(state, x, layers, training, shortcuts):
    x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1), training).clamp(min=0)
    for stage, count in enumerate(layers, 1):
        for i in range(count):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            out = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = norm(state, f"{name}.bn1", out, training).clamp(min=0)
            out = norm(state, f"{name}.bn2", F.conv2d(out, state[f"{name}.conv2.weight"], padding=1), training)
            if shortcuts and f"{name}.downsample.0.weight" in state:
                projected = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                out = out + norm(state, f"{name}.downsample.1", projected, training)
            elif shortcuts:
                kept = x[:, :, ::stride, ::stride]
                out = out + torch.cat([kept, kept.new_zeros(len(x), out.shape[1] - x.shape[1], *kept.shape[2:])], 1)
            x = out.clamp(min=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


NETWORKS = {
    "A": lambda: CifarResNet(BasicBlock, (1, 2, 1)),
    "B": lambda: CifarResNet(BasicBlock, (1, 2, 1), shortcut="B"),
    "plain": lambda: CifarPlainNet((1, 2, 1)),
}


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_follows_the_formulas(case, training):
    model = scattered(NETWORKS[case]()).train(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, _ in model.named_parameters():
        state[key].requires_grad_()
    x, expected_x = (normal(3, 3, 13, 12).requires_grad_() for _ in range(2))
    out, expected = model(x), network(state, expected_x, (1, 2, 1), training, case != "plain")
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    out.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-8, atol=1e-10)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[key].grad, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("builder", [models.plain18, models.plain20])
def test_plain_nets_have_no_shortcut(builder):
    model = meta(builder)
    blocks = [m for m in model.modules() if isinstance(m, PlainBlock)]
    assert blocks and not any(block.downsample for block in blocks)
    block = PlainBlock(4, 4)
    nn.init.zeros_(block.conv2.weight)
    assert block(torch.randn(2, 4, 5, 5)).eq(0).all()  # nothing goes around the convolutions


def test_options_reach_the_blocks():
    model = meta(models.resnet20, num_classes=3, norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3), shortcut="B")
    assert model.layer3[2].bn2.eps == model.layer2[0].downsample[1].eps == 1e-3 and model.fc.out_features == 3
    assert all(block.bn2.weight.eq(0).all() for block in models.resnet20(zero_init_residual=True).layer2)


def test_errors():
    with pytest.raises(ValueError, match="shortcut must be one of 'A', 'B', got 'C'"):
        models.resnet20(shortcut="C")
    with pytest.raises(ValueError, match="planes must be at least inplanes, got 8 and 16"):
        PaddedShortcut(16, 8)
    with pytest.raises(ValueError, match="downsample must be None"):
        PlainBlock(4, 4, 1, nn.Identity())
    with pytest.raises(ValueError, match="groups=1"):
        PlainBlock(4, 4, groups=2)
