"""Equality on photographs: passes for the same mathematics, names the tensor for any other."""

import copy

import pytest
import torch
from torch import nn

from resnet_fused import models
from resnet_fused.bench import equality, photos
from resnet_fused.bench.blocks import distinct_blocks


def small():
    """A Bottleneck between a stem and a classifier."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    block = models.Bottleneck(64, 16)
    model = nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    equality.scatter_norms(model)
    return model.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def x():
    pytest.importorskip("skimage")
    return photos.batches(1, 4, 32)[0]


def wrong(stock, other, x, names=("1",)):
    return [d.tensor for d in equality.check(stock, other, x, names) if not d.agrees]


def test_a_model_equals_itself_in_another_layout(x):
    stock = small()
    assert wrong(stock, copy.deepcopy(stock).to(memory_format=torch.contiguous_format), x) == []


def test_does_not_change_the_models(x):
    stock = small()
    before = {key: value.clone() for key, value in stock.state_dict().items()}
    equality.check(stock, copy.deepcopy(stock), x, ["1"])
    for key, value in stock.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in stock.parameters())


def test_slightly_wrong_weight(x):
    stock, other = small(), small()
    with torch.no_grad():
        other[1].conv2.weight.mul_(1 + 1e-3)  # the norm behind it hides this from the output
    assert "1: gradient of conv2.weight" in wrong(stock, other, x)


def test_wrong_running_statistics(x):
    stock, other = small(), small()
    other[1].bn2.momentum = 0.2
    assert "buffer 1.bn2.running_mean" in wrong(stock, other, x)


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class Halving(nn.Module):
    def forward(self, x):
        return HalfGradient.apply(x)


def test_wrong_gradient_behind_a_right_output(x):
    stock, other = small(), small()
    other.insert(3, Halving())
    other[0], names = nn.Sequential(other[0]), ()
    bad = wrong(stock, nn.Sequential(*other), x, names)
    assert "gradient of the input" in bad
    assert "output in training" not in bad


def test_a_missing_gradient_and_nan_are_wrong(x):
    stock, other = small(), small()
    other[1].conv1.weight.requires_grad_(False)
    with torch.no_grad():
        other[4].bias[3] = float("nan")
    bad = wrong(stock, other, x)
    assert "gradient of 1.conv1.weight" in bad
    assert "output in evaluation" in bad


def test_errors_are_relative():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert equality.error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert equality.error(torch.tensor([0.0, 0.5]), torch.zeros(2)) == pytest.approx(0.5)
    assert equality.error(None, exact) == float("inf")
    assert equality.error(torch.zeros(3), exact) == float("inf")


def test_summary_names_the_worst(x):
    stock = small()
    rows = equality.summary(equality.check(stock, copy.deepcopy(stock), x, ["1"]))
    assert {(row["scope"], row["kind"]) for row in rows} == {
        (scope, kind) for scope in ("whole model", "blocks") for kind in ("output", "gradient", "buffer")
    }
    assert all(row["fused"] <= row["limit"] for row in rows)


def test_distinct_blocks_of_resnet18():
    stock = models.resnet18(num_classes=2)
    names = [name for name, module in stock.named_modules() if isinstance(module, models.BasicBlock)]
    before = stock.bn1.running_mean.clone()
    found = distinct_blocks(stock, names, torch.randn(2, 3, 64, 64))
    once = ["layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1"]
    assert [(block.name, block.alike) for block in found] == [("layer1.0", 2), *((name, 1) for name in once)]
    assert found[1].label(16) == "layer2.0 [16, 64, 16, 16]"
    assert torch.equal(stock.bn1.running_mean, before)
    assert not any(module._forward_pre_hooks for module in stock.modules())


def test_photographs_are_real_and_repeatable(x):
    again, other = photos.batches(2, 4, 32)
    assert torch.equal(again, x)
    assert not torch.equal(other, x)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.std((2, 3)).min() > 0.1  # no flat images


def test_no_photographs_says_what_to_install(monkeypatch):
    monkeypatch.setattr(photos, "NAMES", {"no-such-distribution": ("a.png",)})
    with pytest.raises(ValueError, match="pip install scikit-image"):
        photos.batches(1, 1, 8)


def test_blocks_that_normalise_more_are_compared_on_less():
    block = torch.nn.Sequential(*(torch.nn.BatchNorm2d(4) for _ in range(8)))
    x = torch.randn(2, 4, 64, 64)
    assert equality.normalised(block, x) == pytest.approx(8)
    small, usual = equality.pieces(x, 512)[0], equality.pieces(x)[0]
    assert small.numel() == 512 and usual.numel() == x.numel()


class Flips(nn.Module):
    """Its weight's gradient is off at some of its calls: as by a ReLU that decided differently, or by a wrong term."""

    def __init__(self, off):
        super().__init__()
        self.conv, self.norm, self.off = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), off

    def forward(self, x):
        calls.append(x)
        return Scaled.apply(torch.relu(self.norm(self.conv(x))), 1.01 if len(calls) // 2 % 5 in self.off else 1.0)


calls = []


@pytest.mark.parametrize(("elements", "off", "agrees"), [(1, 3, True), (1, 5, False), (150_000, 3, False)])
def test_where_most_runs_have_a_flip_the_smallest_errors_are_compared(monkeypatch, elements, off, agrees):
    monkeypatch.setattr(equality, "BLOCK_ELEMENTS", elements)
    torch.manual_seed(0)
    stock, x = Flips(()), torch.randn(4, 4, 2, 2)
    other = copy.deepcopy(stock)
    other.off = range(off)
    calls.clear()
    monkeypatch.setattr(equality, "observe", _apart(equality.observe, stock))
    (block,) = distinct_blocks(nn.Sequential(stock), ["0"], x)
    calls.clear()
    found = equality.check_block(stock, other, block, None)
    assert all(difference.agrees for difference in found) is agrees
    assert equality.pieces(x, 1)[0].shape == (2, 4, 2, 2)


def _apart(observe, stock):
    """Of a copy of stock no calls are counted."""

    def observed(model, *args):
        seen = observe(model, *args)
        if not model.off:
            del calls[-2:]
        return seen

    return observed


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.by, None


class BiasGradient(nn.Conv2d):
    """A convolution whose bias gets so many times its gradient."""

    by = 1.0

    def forward(self, x):
        return self._conv_forward(x, self.weight, Scaled.apply(self.bias, self.by))


@pytest.mark.parametrize(("by", "normalised", "agrees"), [(4, True, True), (1e6, True, False), (1.01, False, False)])
def test_a_bias_before_a_norm_has_no_gradient_but_rounding(by, normalised, agrees):
    torch.manual_seed(0)
    convolution, x = BiasGradient(3, 8, 3), torch.randn(4, 3, 8, 8)
    stock = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU()) if normalised else nn.Sequential(convolution)
    other = copy.deepcopy(stock)
    other[0].by = by
    found = equality.compare([(stock, other, x)], None, 0.0)
    assert [d.tensor for d in found if not d.agrees] == ([] if agrees else ["gradient of 0.bias"])


def test_blocks_that_differ_in_how_often_they_are_dropped_are_one_kind():
    model = models.resnet20(stochastic_depth_rate=0.5)
    names = [f"layer{stage}.{i}" for stage in (1, 2) for i in range(3)]
    found = distinct_blocks(model, names, torch.randn(1, 3, 8, 8))
    assert [(block.name, block.alike) for block in found] == [("layer1.0", 3), ("layer2.0", 1), ("layer2.1", 2)]
