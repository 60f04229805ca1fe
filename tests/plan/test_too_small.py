"""What is too small to gain runs in stock operations, and as stock's modules would run."""

import copy

import pytest
import torch
from torch import nn
from tuned import notes

import resnet_fused
from resnet_fused.models import BasicBlock, Bottleneck
from resnet_fused.plan import too_small
from resnet_fused.plan.keys import threads
from resnet_fused.steps import conv, grouped, winograd

SAID = "stock (stays in the cache)"


@pytest.fixture(autouse=True)
def where_it_was_measured(monkeypatch):
    """On the CPU that the limit is for, with a cache of 1 MB."""
    for module in (too_small, conv):
        monkeypatch.setattr(module, "HAS_AVX512", True)
        monkeypatch.setattr(module, "SLOW_PRODUCTS", False)
    monkeypatch.setattr(too_small, "cache_bytes", lambda: 1 << 20)


def fits(n, size=8):
    return torch.randn(n, 64, size, size).contiguous(memory_format=torch.channels_last)


def fused(**kwargs):
    return resnet_fused.fuse(Bottleneck(64, 16, **kwargs).to(memory_format=torch.channels_last))


@pytest.mark.plans_small
def test_the_limit_is_what_stock_saves():
    """(64 + 2*(16 + 16 + 64)) * 8 * 8 * 4 bytes an image."""
    model, image = fused(), 65536
    assert notes(model, fits((1 << 20) // image)) == [SAID]
    assert notes(model, fits((1 << 20) // image + 1)) != [SAID]


@pytest.mark.plans_small
def test_what_is_never_small(monkeypatch):
    model = fused()
    assert notes(model, fits(2)) == [SAID]
    with resnet_fused.use("cpu"):
        assert notes(model, fits(2)) != [SAID]
    few = fits(1, 2)  # pixels beside the weights
    assert notes(model, few) == [SAID]
    monkeypatch.setattr(too_small, "_LARGE_WEIGHTS", 1 << 11)
    assert notes(model, few) != [SAID]
    for module in (too_small, conv):
        monkeypatch.setattr(module, "SLOW_PRODUCTS", True)
    assert notes(model, few) == [SAID]
    monkeypatch.setattr(too_small, "HAS_AVX512", False)
    assert notes(model, fits(2)) != [SAID]


@pytest.mark.plans_small
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_has_a_limit_by_its_own_size(dtype):
    model, image = fused().to(dtype), 65536 // 4 * dtype.itemsize
    assert notes(model, fits((1 << 20) // image).to(dtype)) == [SAID]
    assert notes(model, fits((1 << 20) // image + 1).to(dtype)) != [SAID]


def test_sixteen_bits_are_faster_only_with_their_instructions(monkeypatch):
    monkeypatch.setattr(too_small.onednn, "SERVED", frozenset({torch.float32, torch.bfloat16}))
    rates = [too_small.rate(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert [2 * rate / rates[1] for rate in rates] == [1, 2, 2, 4]


@pytest.mark.plans_small
def test_memory_is_worth_two_percent(monkeypatch):
    """Six times (64*16 + 9*16*16 + 16*64) * 64 pixels FLOPs an image."""
    monkeypatch.setattr(too_small, "threads", lambda: 4)
    flops = 6 * 4352 * 64 * 2
    for seconds, chosen in ((0.021, True), (0.019, False)):
        monkeypatch.setattr(too_small, "_OVERHEAD", seconds)
        monkeypatch.setattr(too_small, "_RATE", flops / 4)
        assert (notes(fused(), fits(2)) == [SAID]) == chosen


@pytest.mark.plans_small
def test_two_percent_are_of_the_time_that_this_processor_takes(monkeypatch):
    """Half of Zen 4's where units are twice as wide."""
    monkeypatch.setattr(too_small, "threads", lambda: 4)
    flops = 6 * 4352 * 64 * 2
    monkeypatch.setattr(too_small, "_RATE", flops / 4)
    monkeypatch.setattr(too_small, "_OVERHEAD", 0.011)
    for wide in (False, True):
        monkeypatch.setattr(too_small, "SLOW_PRODUCTS", wide)
        assert (notes(fused(), fits(2)) == [SAID]) == wide


@pytest.mark.plans_small
@pytest.mark.skipif(not winograd.IS_BUILT, reason="no compiled library for AVX2 or AVX-512")
def test_filtering_that_saves_more_than_python_takes(monkeypatch):
    """Two convolutions of 64 channels on 2 images of 8x8, forward and input's gradient: 32 tiles each."""
    monkeypatch.setattr(too_small, "threads", lambda: 2)
    saved = 4 * (9 * 128 * 64 * 64 - 32 * (16 * 64 * 64 + 200 * 128))
    for share, small in ((0.99, False), (1.01, True)):
        monkeypatch.setattr(too_small, "_OVERHEAD", share * 2 * saved / (2 * too_small.rate(torch.float32)))
        model = resnet_fused.fuse(BasicBlock(64, 64).to(memory_format=torch.channels_last))
        assert (notes(model, fits(2)) == [SAID]) is small
        assert notes(model.double(), fits(2).double()) == [SAID]


@pytest.mark.plans_small
@pytest.mark.skipif(not grouped.IS_BUILT, reason="no compiled library for AVX2 or AVX-512")
def test_what_groups_save_counts_against_what_python_takes(monkeypatch):
    """32 channels in groups of 4 on 2 images of 8x8: oneDNN takes twice as long as ours, at 0.6 of the peak."""
    monkeypatch.setattr(grouped, "_HERE", grouped.AVX512)
    monkeypatch.setattr(too_small, "threads", lambda: 2)
    rate = 2 * too_small.rate(torch.float32)
    saved = 2 * 3 * 128 * 32 * 4 * 9 / 0.6 / rate
    worth = too_small.MARGIN * 6 * 128 * (64 * 32 + 32 * 4 * 9 + 32 * 64) / rate
    for seconds, small in ((0.99 * (saved + worth), False), (1.01 * (saved + worth), True)):
        monkeypatch.setattr(too_small, "_OVERHEAD", seconds)
        model = fused(groups=8, base_width=16)
        assert (notes(model, fits(2)) == [SAID]) is small
        assert notes(model.double(), fits(1).double()) == [SAID]


def test_not_where_everything_is_to_be_fused():
    assert notes(fused(), fits(2)) != [SAID]


@pytest.mark.plans_small
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("block", [lambda: Bottleneck(64, 16), lambda: BasicBlock(64, 64),
                                   lambda: Bottleneck(64, 32, 2, nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128)))])  # fmt: skip  # noqa: E501
def test_equals_stock_to_the_bit(block, momentum):
    stock = block().to(memory_format=torch.channels_last)
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    ours = resnet_fused.fuse(copy.deepcopy(stock))
    x, y = fits(2).requires_grad_(), fits(2)
    for model in (stock, ours):
        x.grad = None
        for step in (x, y + x):
            model(step).square().mean().backward()
        model.grad_of_x = x.grad
    assert notes(ours, x) == [SAID]
    stock(x)
    assert torch.equal(stock.grad_of_x, ours.grad_of_x)
    for (name, theirs), mine in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(theirs.grad, mine.grad), name
    for (name, theirs), mine in zip(stock.named_buffers(), ours.buffers(), strict=True):
        assert torch.equal(theirs, mine), name


def test_size_of_the_cache(monkeypatch):
    monkeypatch.undo()
    assert 1 << 17 <= too_small.cache_bytes() <= 1 << 31
    assert too_small.cache_bytes() % 1024 == 0


@pytest.mark.plans_small
@pytest.mark.parametrize(
    ("channels", "size", "layout", "word"),
    [
        (64, 4, torch.channels_last, "stock (too small to gain)"),
        (64, 8, torch.channels_last, "stock (too small to gain)"),
        (640, 1, torch.channels_last, "few pixels"),  # two weights of 14.7 MB
        (256, 2, torch.channels_last, "stock (too small to gain)"),  # of 2.4 MB, which stock multiplies well
        (256, 2, torch.contiguous_format, "few pixels"),  # and slowly
        (64, 96, torch.channels_last, "convolution with norm, ReLU; "),
    ],
)
def test_evaluation_is_stocks_where_fusion_saves_less_than_python_takes(channels, size, layout, word):
    model = resnet_fused.fuse(BasicBlock(channels, channels).eval()).to(memory_format=layout)
    x = torch.randn(1, channels, size, size).contiguous(memory_format=layout)
    with torch.no_grad():
        (said,) = notes(model, x)
        assert word in said
        with resnet_fused.use("cpu"):
            assert "stock" not in notes(model, x)[0]


@pytest.mark.plans_small
def test_averages_before_a_convolution_save_products():
    """Three quarters of them: what Python takes longer, or not."""
    layers = nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1, bias=False), nn.AvgPool2d(2)
    stock = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x, seconds = fits(4), 3 * 2 * 64 * 64 * 4 * 8 * 8 * 3 / 4 / (too_small.rate(torch.float32) * threads())
    for factor, small in ((0.99, False), (1.01, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(too_small, "_OVERHEAD", factor * seconds)
            patch.setattr(too_small, "MARGIN", 0)
            patch.setattr(too_small, "cache_bytes", lambda: 1 << 30)
            assert (notes(resnet_fused.fuse(copy.deepcopy(stock)), x) == [SAID]) is small
