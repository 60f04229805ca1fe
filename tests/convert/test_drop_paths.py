"""Stochastic depth in fused blocks: timm's, torchvision's and ours, with stock's draws and stock's numbers."""

import copy
import sys

import pytest
import torch
from nets import observe
from preact_blocks import plan_of
from torch import nn

import resnet_fused
from resnet_fused.convert import fused_module
from resnet_fused.models import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, StochasticDepth, WideBlock
from resnet_fused.plan import variants
from resnet_fused.steps.conv import HAS_AVX512
from resnet_fused.testing.vision import import_torchvision

F64 = torch.float64


def _torchvisions(p, mode):
    return import_torchvision().ops.StochasticDepth(p, mode)


def _timms(p, scale_by_keep=True):
    import_torchvision()
    return pytest.importorskip("timm.layers").DropPath(p, scale_by_keep)


DROPS = {
    "ours": lambda: StochasticDepth(0.5),
    "ours, batch": lambda: StochasticDepth(0.4, "batch"),
    "torchvision's": lambda: _torchvisions(0.5, "row"),
    "torchvision's, batch": lambda: _torchvisions(0.4, "batch"),
    "timm's": lambda: _timms(0.5),
    "timm's, unscaled": lambda: _timms(0.5, False),
    "always": lambda: StochasticDepth(1.0),
    "never": lambda: _torchvisions(0.0, "row"),
}
BLOCKS = (BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, WideBlock)


def dropping(drop, kind=BasicBlock, projects=False, planes=4):
    """A block of 64-bit numbers with a drop path, trained-looking."""
    torch.manual_seed(0)
    outputs = planes * kind.expansion
    inputs, shortcut = (6, nn.Conv2d(6, outputs, 1, bias=False)) if projects else (outputs, None)
    if projects and not kind.norm_first:
        shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
    block = kind(inputs, planes, 1, shortcut)
    block.drop_path = drop
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return block.double().train()


def batch(block, samples=6, size=5):
    channels = block.bn1.num_features if block.norm_first else block.conv1.in_channels
    return torch.randn(samples, channels, size, size, dtype=F64, generator=torch.Generator().manual_seed(1))


def assert_equal(fused, stock, x, rtol=1e-9):
    got, got_state = observe(fused, x), torch.get_rng_state()
    want, want_state = observe(stock, x), torch.get_rng_state()
    assert got.keys() == want.keys() and torch.equal(got_state, want_state)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("projects", [False, True], ids=["identity", "projection"])
def test_draws_and_numbers_are_stocks(drop, kind, projects):
    stock = dropping(DROPS[drop](), kind, projects)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), batch(stock)
    row = resnet_fused.report(fused).fused[0]
    assert "* drop_path + " in row.what and row.passes.fused == row.passes.total
    assert_equal(fused, stock, x)
    if drop == "ours":
        assert_equal(fused.eval(), stock.eval(), x)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_factor_changes_no_steps(kind):
    """What runs with a drop path is what runs without: no pass more, and the same joins.

    But for a Gram join on tensors, as without AVX-512: no convolution there applies a factor.
    """
    plans = []
    for drop in (StochasticDepth(0.5), None):
        block = resnet_fused.fuse(dropping(drop, kind, planes=64).float().to(memory_format=torch.channels_last))
        x = batch(block, 4, 14).float().contiguous(memory_format=torch.channels_last)
        with resnet_fused.use("cpu"):
            plans.append([text.split(" (")[0] for text in plan_of(block, x)])
    if not HAS_AVX512:
        plans[1] = [text.replace("Gram join", "convolution; norm on load; plain join") for text in plans[1]]
    assert plans[0] == plans[1] and "convolution" in plans[0][0]


@pytest.mark.parametrize("drop", ["ours", "ours, batch"])
@pytest.mark.parametrize("projects", [False, True], ids=["identity", "projection"])
def test_gram_join_with_a_factor(drop, projects, monkeypatch):
    """Statistics are of all samples; the factor comes behind."""
    stock = dropping(DROPS[drop](), Bottleneck, projects)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), batch(stock)
    monkeypatch.setattr(variants, "modelled", lambda *_: variants.Variant(values=True, gram=True, gram_shortcut=True))
    assert "Gram join on values" in plan_of(fused, x)[0]
    assert_equal(fused, stock, x, rtol=1e-7)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_settings_are_read_at_each_call(rate):
    stock = dropping(StochasticDepth(0.5))
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), batch(stock)
    for block in (fused, stock):
        block.drop_path.p, block.drop_path.mode = rate, "batch"
    assert_equal(fused, stock, x)
    for block in (fused, stock):
        block.drop_path.eval()
    assert_equal(fused, stock, x)


@pytest.mark.parametrize(("name", "value"), [("p", 1.5), ("p", -0.5), ("mode", "column")])
@pytest.mark.parametrize("training", [True, False])
def test_stocks_errors(name, value, training):
    stock = dropping(_torchvisions(0.5, "row"))
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), batch(stock)
    told = []
    for block in (fused, stock):
        setattr(block.train(training).drop_path, name, value)
        with pytest.raises(ValueError, match="has to be") as raised:
            block(x)
        told.append(str(raised.value))
    assert told[0] == told[1]
    for name, buffer in stock.named_buffers():
        assert torch.equal(buffer, fused.get_buffer(name))


@pytest.mark.parametrize("drop", ["torchvision's", "timm's"])
def test_a_function_that_somebody_replaced_is_called(drop, monkeypatch):
    stock = dropping(DROPS[drop]())
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), batch(stock)
    module = sys.modules[type(stock.drop_path).__module__]
    name = "drop_path" if drop == "timm's" else "stochastic_depth"
    monkeypatch.setattr(module, name, lambda x, *settings: 3 * x)
    assert "was replaced" in str(resnet_fused.report(fused))
    assert_equal(fused, stock, x)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_autocast_draws_in_the_dtype_of_the_branch(dtype):
    """Autocast leaves float64 alone, and so does the factor: 1 / 0.7 is not what it is in bfloat16."""
    stock = dropping(StochasticDepth(0.3)).to(dtype)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), batch(stock).to(dtype)
    outs = []
    for block in (fused, stock):
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(block(x))
    tolerance = 1e-9 if dtype is F64 else 5e-2
    torch.testing.assert_close(*outs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_what_is_dropped_still_moves_statistics_and_spreads_nan(mode):
    """0 times what is not finite is NaN, in stock as well: a dropped branch is computed."""
    stock = dropping(StochasticDepth(1.0, mode))
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), batch(stock)
    assert_equal(fused, stock, x)
    assert fused.bn2.running_mean.count_nonzero() and fused.bn2.num_batches_tracked == 1
    for block in (fused, stock):
        block.bn2.bias.data[1] = torch.inf
    assert stock(x)[:, 1].isnan().all()
    torch.testing.assert_close(fused(x), stock(x), equal_nan=True)


def test_networks_of_ours():
    torch.manual_seed(0)
    options = {"stochastic_depth_rate": 0.5, "stochastic_depth_mode": "batch"}
    stock = resnet_fused.models.CifarResNet(BasicBlock, (1, 2, 1), **options).double()
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), torch.randn(5, 3, 9, 9, dtype=F64)
    for _ in range(2):
        assert_equal(fused, stock, x, rtol=1e-7)


@pytest.mark.parametrize("drop", ["ours", "ours, batch", "timm's", "torchvision's"])
def test_repeated_calls_draw_anew(drop):
    """From some call of a form on, what it dispatches is repeated: with this call's factor, and settings."""
    stock = dropping(DROPS[drop](), Bottleneck).to(memory_format=torch.channels_last)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), batch(stock).contiguous(memory_format=torch.channels_last)
    for seed in range(12):
        if seed == 9:
            for block in (fused, stock):
                block.drop_path.eval()
        outs = []
        for block in (fused, stock):
            given = x.clone().requires_grad_()
            torch.manual_seed(seed)
            out = block(given)
            out.square().sum().backward()
            outs.append((out, given.grad, block.conv1.weight.grad, block.bn3.running_var, torch.get_rng_state()))
        for got, want in zip(*outs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_such_a_module_is_compared_and_not_read_again():
    stock = dropping(StochasticDepth(0.5))
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), batch(stock)
    fused(x), fused(x)
    (site,) = fused_module.runnable(fused).sites
    assert site.kept.unchanged and site.kept.unchanged.holds() and site.kept.unchanged.ready
    fused.drop_path.p = 0.25
    assert not site.kept.unchanged.holds()
