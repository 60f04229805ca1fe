"""The pre-activation networks: the paper's formulas and sizes, and timm's resnetv2 under other names."""

import functools

import pytest
import torch
from architectures import meta, normal, scattered
from torch import nn
from torch.nn import functional as F

from resnet_fused import models
from resnet_fused.bench import named
from resnet_fused.models import PreActBasicBlock, PreActBottleneck, PreActResNet, PreActResNetCifar
from resnet_fused.testing.vision import import_torchvision

PARAMETERS = {  # timm's resnetv2; the paper's 1.7 M for 110 and 164 layers, 10.2 M for 1001
    "preact_resnet50": 25_549_352,
    "preact_resnet101": 44_541_480,
    "preact_resnet152": 60_185_128,
    "preact_resnet110": 1_730_522,
    "preact_resnet164": 1_703_258,
    "preact_resnet1001": 10_327_706,
}
SMALL = (1, 2, 1)
BLOCKS = {"basic": PreActBasicBlock, "bottleneck": PreActBottleneck}


@pytest.fixture
def timm():
    try:
        import_torchvision()
        return pytest.importorskip("timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import: {error}")


def last_of(block):
    return block.conv2 if isinstance(block, PreActBasicBlock) else block.conv3


def test_every_builder_is_covered():
    assert sorted(PARAMETERS) == sorted(name for name in models.BUILDERS if name.startswith("preact_"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert sum(p.numel() for p in meta(models.BUILDERS[name]).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_depth_is_what_the_name_says(name):
    layers = [key for key, m in meta(models.BUILDERS[name]).named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sum("downsample" not in key for key in layers) == int(name.removeprefix("preact_resnet"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes(name):
    model = meta(models.BUILDERS[name], num_classes=7)
    small = name in ("preact_resnet110", "preact_resnet164", "preact_resnet1001")
    edge = named.input_size(model)
    assert edge == (32 if small else 224)
    assert meta(models.BUILDERS[name]).fc.out_features == (10 if small else 1000)
    last = model.layer3 if small else model.layer4
    seen = []
    last.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    assert model(torch.empty(2, 3, edge, edge, device="meta")).shape == (2, 7)
    assert seen == [(2, {"preact_resnet110": 64}.get(name, 256), 8, 8) if small else (2, 2048, 7, 7)]


def norm(state, name, x, training):
    dims = (0, 2, 3)
    if training:
        mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
    else:
        mean, var = (state[f"{name}.running_{which}"].view(1, -1, 1, 1) for which in ("mean", "var"))
    scale, shift = (state[f"{name}.{which}"].view(1, -1, 1, 1) for which in ("weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def unit(state, name, x, stride, training):
    """A residual unit of the paper's: x + F(x), or W a + F(x) where ``W`` projects, with ``a = relu(norm(x))``."""
    activated = norm(state, f"{name}.bn1", x, training).clamp(min=0)
    last = 3 if f"{name}.conv3.weight" in state else 2
    strided = last - 1  # the first 3x3 convolution
    value = activated
    for i in range(1, last + 1):
        weight = state[f"{name}.conv{i}.weight"]
        if i > 1:
            value = norm(state, f"{name}.bn{i}", value, training).clamp(min=0)
        value = F.conv2d(value, weight, stride=stride if i == strided else 1, padding=weight.shape[-1] // 2)
    if f"{name}.downsample.weight" in state:
        return value + F.conv2d(activated, state[f"{name}.downsample.weight"], stride=stride)
    return value + (activated if name == "layer1.0" else x)  # the net's first unit: both paths part behind a


def network(state, x, layers, training):
    if len(layers) == 4:
        x = F.max_pool2d(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), 3, 2, 1)
    else:
        x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage, count in enumerate(layers, 1):
        for i in range(count):
            x = unit(state, f"layer{stage}.{i}", x, 2 if stage > 1 and i == 0 else 1, training)
    pooled = norm(state, "bn", x, training).clamp(min=0).mean((2, 3))
    return pooled @ state["fc.weight"].T + state["fc.bias"]


NETWORKS = {
    "cifar-basic": lambda: PreActResNetCifar(PreActBasicBlock, SMALL),
    "cifar-bottleneck": lambda: PreActResNetCifar(PreActBottleneck, SMALL),
    "imagenet": lambda: PreActResNet(PreActBottleneck, (*SMALL, 1), num_classes=5),
}


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_follows_the_formulas(case, training):
    model = scattered(NETWORKS[case]()).train(training)
    layers = (*SMALL, 1) if case == "imagenet" else SMALL
    size = 40 if case == "imagenet" else 12
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, _ in model.named_parameters():
        state[key].requires_grad_()
    x, expected_x = (normal(3, 3, size, size).requires_grad_() for _ in range(2))
    out, expected = model(x), network(state, expected_x, layers, training)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weights = normal(*out.shape, seed=2)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-8, atol=1e-9)
    for key, parameter in model.named_parameters():
        assert parameter.grad.count_nonzero() > 0, key
        torch.testing.assert_close(parameter.grad, state[key].grad, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_identity_path_is_untouched(block):
    """A branch of integers makes output - branch exact: it is the input, bit by bit, and so is the gradient's path."""
    module = scattered(block(4 * block.expansion, 4))
    branches = []

    def whole_numbers(conv, args, out):
        branches.append(out.round())
        return branches[-1]

    last_of(module).register_forward_hook(whole_numbers)
    x = (normal(2, 4 * block.expansion, 6, 6) * 64).round().div(64).requires_grad_()  # of both signs
    before = x.detach().clone()
    out = module(x)
    assert torch.equal(out - branches[0], before) and torch.equal(x.detach(), before)
    assert branches[0].count_nonzero() > 0
    out.backward(torch.full_like(out, 0.75))  # rounding stops the branch's gradient
    assert torch.equal(x.grad, torch.full_like(x, 0.75))


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_projection_reads_the_activated_value(block):
    seen = {}
    module = scattered(block(6, 4, 2, nn.Conv2d(6, 4 * block.expansion, 1, stride=2, bias=False)))
    module.downsample.register_forward_pre_hook(lambda module, args: seen.update(projection=args[0].clone()))
    module.conv1.register_forward_pre_hook(lambda module, args: seen.update(branch=args[0].clone()))
    x = normal(2, 6, 7, 7)
    assert module(x).shape == (2, 4 * block.expansion, 4, 4)
    assert torch.equal(seen["projection"], seen["branch"]) and seen["projection"].min() == 0
    assert not torch.equal(seen["projection"], x.relu())


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_without_norms_the_input_is_not_written_to(block):
    """The ReLU behind an ``nn.Identity`` must not work in place: its input is the block's own, and the shortcut."""
    module = block(4 * block.expansion, 4, norm_layer=nn.Identity).double()
    x = normal(2, 4 * block.expansion, 5, 5)
    before = x.clone()
    nn.init.zeros_(last_of(module).weight)
    assert torch.equal(module(x), before) and torch.equal(x, before)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_zero_init_makes_blocks_their_shortcut_and_they_learn(block):
    model = PreActResNetCifar(block, SMALL, zero_init_residual=True).double()
    x = normal(2, 32 * block.expansion, 4, 4)
    assert torch.equal(model.layer2[1](x), x)
    model(normal(2, 3, 8, 8)).square().sum().backward()
    assert last_of(model.layer2[1]).weight.grad.count_nonzero() > 0


def test_state_dict_names():
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def unit_names(name, parts):
        return [f"{name}.{part}.{leaf}" for part in parts for leaf in (norms if "bn" in part else ("weight",))]

    inner = ("bn1", "conv1", "bn2", "conv2", "bn3", "conv3")
    expected = ["conv1.weight"]
    for stage, count in zip((1, 2, 3, 4), (1, 2, 1, 1), strict=True):
        for i in range(count):
            expected += unit_names(f"layer{stage}.{i}", inner if i else (*inner, "downsample"))
    expected += [f"bn.{leaf}" for leaf in norms] + ["fc.weight", "fc.bias"]
    assert list(meta(PreActResNet, block=PreActBottleneck, layers=(*SMALL, 1)).state_dict()) == expected
    basic = meta(PreActResNetCifar, block=PreActBasicBlock, layers=SMALL).layer1.state_dict(prefix="layer1.")
    assert list(basic) == unit_names("layer1.0", ("bn1", "conv1", "bn2", "conv2"))


def from_timm(state):
    """timm's state under our names, as the docstring of ``resnet_fused.models.preact`` says."""
    ours = {}
    for key, value in state.items():
        renamed = key.replace("stem.conv", "conv1").replace("head.fc", "fc").replace("downsample.conv", "downsample")
        if renamed.startswith("stages."):
            _, stage, _, rest = renamed.split(".", 3)
            renamed = f"layer{int(stage) + 1}.{rest}"
        ours[renamed.replace("norm", "bn")] = value.flatten(1) if key == "head.fc.weight" else value
    return ours


CASES = {
    "resnetv2_50": (models.preact_resnet50, {}, {}),
    "resnetv2_50-dilated": (
        models.preact_resnet50,
        {"replace_stride_with_dilation": (False, True, True)},
        {"output_stride": 8},
    ),
    "resnetv2_18": (functools.partial(PreActResNet, PreActBasicBlock, (2, 2, 2, 2)), {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_timm(timm, case):
    builder, ours, theirs = CASES[case]
    other = scattered(timm.create_model(case.split("-")[0], num_classes=5, **theirs))
    model = builder(num_classes=5, **ours).double()
    model.load_state_dict(from_timm(other.state_dict()), strict=True)
    for training in (True, False):  # training moves the statistics that evaluation then uses
        x, other_x = (normal(2, 3, 64, 64).requires_grad_() for _ in range(2))
        out, expected = model.train(training)(x), other.train(training)(other_x)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        out.square().mean().backward()
        expected.square().mean().backward()
        torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-7, atol=1e-9)
    states = model.state_dict(), from_timm(other.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnetv2_50", "resnetv2_101", "resnetv2_152"])
def test_state_of_timm(timm, name):
    theirs = from_timm(meta(functools.partial(timm.create_model, name)).state_dict())
    ours = meta(models.BUILDERS[name.replace("resnetv2_", "preact_resnet")]).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_options():
    model = meta(
        models.preact_resnet50, num_classes=3, groups=2, width_per_group=32, norm_layer=lambda c: nn.GroupNorm(2, c)
    )
    assert model.layer1[1].conv2.groups == 2 and model.layer1[1].conv2.out_channels == 64
    assert isinstance(model.layer4[2].bn3, nn.GroupNorm) and isinstance(model.bn, nn.GroupNorm)
    small = meta(models.preact_resnet110, norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3))
    assert small.layer3[17].bn2.eps == small.bn.eps == 1e-3


@pytest.mark.parametrize("options", [{"groups": 2}, {"base_width": 128}, {"dilation": 2}], ids=str)
def test_basic_block_refuses(options):
    with pytest.raises(NotImplementedError if "dilation" in options else ValueError, match="PreActBasicBlock"):
        PreActBasicBlock(64, 64, **options)


def test_dilation_needs_three_elements():
    with pytest.raises(ValueError, match="3-element tuple, got \\(True,\\)"):
        models.preact_resnet50(replace_stride_with_dilation=(True,))


def test_channels_last_stays_channels_last():
    model = PreActResNetCifar(PreActBottleneck, SMALL).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    assert model.layer2(model.layer1(model.conv1(x))).is_contiguous(memory_format=torch.channels_last)
