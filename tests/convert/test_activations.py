"""Batch norms with activations other than ReLU behind them through ``fuse``: modules, functions, inside a norm."""

import copy
import functools

import pytest
import torch
from activated import F64, MODULES, Functions, Inverted, assert_same, image, pair
from torch import nn

import resnet_fused
from resnet_fused.blocks.runtime import fused_programs
from resnet_fused.testing.vision import import_torchvision


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 12])
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_one_program_with_stocks_numbers(name, groups, training):
    fused, stock = pair(Inverted(MODULES[name], groups))
    fused.train(training), stock.train(training)
    for _ in range(3):
        assert_same(fused, stock, image(), runs=1)
    assert "3 of 3 convolutions, 6 of 6 passes" in str(resnet_fused.report(fused))


@pytest.mark.parametrize("training", [True, False])
def test_functions_are_read_with_their_arguments(training):
    fused, stock = pair(Functions())
    fused.train(training), stock.train(training)
    assert_same(fused, stock, image(), runs=1)
    text = str(resnet_fused.report(fused))
    assert "conv1-bn1-silu-conv2-bn2-leaky_relu0.3-conv3-bn3-gelu_tanh-conv4-bn4-hardswish-conv5-bn5-relu6" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_evaluation_is_as_exact_as_stock(name, dtype):
    fused, stock = pair(Inverted(MODULES[name], 1))
    exact = copy.deepcopy(stock).to(dtype).to(F64).eval()
    fused, stock, x = fused.to(dtype).eval(), stock.to(dtype).eval(), image(dtype)
    with torch.no_grad(), resnet_fused.use("cpu"):
        want = exact(x.to(F64))
        theirs = (stock(x).to(F64) - want).norm()
        for _ in range(3):  # at first sight, for a known shape, and settled
            error = (fused(x).to(F64) - want).norm()
            assert error <= 2 * theirs + torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu, tanh", "leaky relu", "hardswish", "relu6"])
def test_what_is_not_finite_stays_where_stock_has_it(name, value):
    block = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), MODULES[name]())
    fused, stock = pair(block)
    fused, stock, x = fused.float().eval(), stock.float().eval(), image(torch.float32)
    x[0, 0, 0, 0] = x[1, 3, 2, 1] = value
    with torch.no_grad(), resnet_fused.use("cpu"):
        for _ in range(3):
            got, want = fused(x), stock(x)
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isposinf(), want.isposinf())
            assert torch.equal(got.isneginf(), want.isneginf())


@pytest.mark.parametrize("name", ["silu", "gelu, tanh", "leaky relu", "hardswish", "relu6"])
def test_twice_differentiated_it_is_stock(name):
    fused, stock = pair(Inverted(MODULES[name], 1))
    found = []
    for model in (fused, stock):
        x = image().requires_grad_()
        with resnet_fused.use("cpu"):
            (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), [x, *model.parameters()]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_frozen_norms_and_frozen_parameters():
    fused, stock = pair(Inverted(nn.SiLU, 1))
    for model in (fused, stock):
        model.bn1.eval(), model.bn2.weight.requires_grad_(False)
    x = image()
    found = []
    for model in (fused, stock):
        with resnet_fused.use("cpu"):
            model.zero_grad()
            model(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert (found[0]["bn2.weight"], found[1]["bn2.weight"]) == (None, None)
    for name, want in found[1].items():
        if want is not None:
            torch.testing.assert_close(found[0][name], want, rtol=1e-9, atol=1e-9)


def kept(found, t):
    found.append(t)
    return t


def test_less_is_saved_than_stock_saves():
    fused, stock = pair(nn.Sequential(nn.Conv2d(6, 32, 1), nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 4, 1)))
    saved = []
    for model in (fused, stock):
        found = []
        hooks = torch.autograd.graph.saved_tensors_hooks(functools.partial(kept, found), lambda t: t)
        with hooks, resnet_fused.use("cpu"):
            model(image())
        large = {t.data_ptr(): t.numel() for t in found if t.dim() == 4 and t.shape[2] > 1}
        saved.append(sum(large.values()))
    assert saved[1] - saved[0] == 3 * 32 * 9 * 7  # the norm's output


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_torchvisions_models(name):
    fused, stock = pair(getattr(import_torchvision().models, name)().features[:5])
    x = torch.randn(2, 3, 33, 31, dtype=F64).contiguous(memory_format=torch.channels_last)
    assert_same(fused, stock, x)


@pytest.mark.parametrize(
    "name, layers", [("efficientnet_b0", ("conv_stem", "bn1", "blocks")), ("mobilenetv3_small_100", ("blocks",))]
)
def test_timms_models(name, layers):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name)
    parts = [getattr(model, layer) for layer in layers]
    first = nn.Sequential(*parts[:-1], *[block for stage in list(parts[-1])[:2] for block in stage])
    fused, stock = pair(first)
    channels = 3 if len(layers) > 1 else 16
    x = torch.randn(2, channels, 17, 15, dtype=F64).contiguous(memory_format=torch.channels_last)
    before = fused_programs()
    assert_same(fused, stock, x)
    assert fused_programs() > before


@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(training):
    fused, stock = pair(Inverted(nn.SiLU, 1))
    fused.train(training), stock.train(training)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=False)
    x = image()
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), stock(x), rtol=1e-9, atol=1e-9)
