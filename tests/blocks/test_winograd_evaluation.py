"""Evaluation by minimal filtering: stock's values, what is kept, when it is made anew, and who asks for how exact."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.backends import bounds
from resnet_fused.models import BasicBlock, Bottleneck, resnet18
from resnet_fused.plan import choose
from resnet_fused.steps import folding, winograd
from resnet_fused.steps.spec import Conv

pytestmark = pytest.mark.skipif(not winograd.IS_BUILT, reason="no compiled library for AVX2 or AVX-512")
F2, F4 = "Winograd F(2x2) convolution", "Winograd F(4x4) convolution"


def with_statistics(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval().to(memory_format=torch.channels_last)


def block(channels=64):
    torch.manual_seed(1)
    return with_statistics(BasicBlock(channels, channels))


def images(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@torch.no_grad()
def said(model, x):
    """What the plan says of a model's programs."""
    with choose.observing() as notes:
        model(x)
    return "; ".join(notes)


@torch.no_grad()
@pytest.mark.parametrize(("precision", "most"), [("default", 1.25), ("fast", 3.0)])
def test_a_resnet18_beside_stock_in_float64(precision, most):
    torch.manual_seed(0)
    stock = with_statistics(resnet18(num_classes=10))
    fused, x = resnet_fused.fuse(copy.deepcopy(stock), precision=precision), images(2, 3, 96, 80)
    text = said(fused, x)
    assert F2 in text and (F4 in text) is (precision == "fast")
    exact = copy.deepcopy(stock).double()(x.double())
    for _ in range(3):
        assert error(fused(x), exact) <= most * error(stock(x), exact)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["default", "fast"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock(precision, value):
    stock, x = block(), images(2, 64, 15, 14)
    x[0, 5, 3, 4] = x[1, 9, 14, 13] = value
    fused, want = resnet_fused.fuse(copy.deepcopy(stock), precision=precision), stock(x)
    for _ in range(3):
        got = fused(x)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got == torch.inf, want == torch.inf)


WRITES = {
    "in place": lambda m: m.conv2.weight.mul_(2),
    "weight by .data": lambda m: m.conv2.weight.data.mul_(2),
    "weight by numpy": lambda m: m.conv1.weight.detach().numpy().__imul__(2),
    "another weight": lambda m: setattr(m.conv2, "weight", nn.Parameter(m.conv2.weight * 2)),
    "gamma": lambda m: m.bn2.weight.data.mul_(2),
    "beta": lambda m: m.bn2.bias.data.add_(1),
    "running_mean": lambda m: m.bn1.running_mean.numpy().__iadd__(1),
    "running_var": lambda m: m.bn2.running_var.data.mul_(4),
    "eps": lambda m: setattr(m.bn2, "eps", 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_write_is_seen_at_the_next_call(write):
    stock, x = block(), images(2, 64, 12, 12)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    for _ in range(2):
        before = fused(x)
    write(stock), write(fused)
    want, got = stock(x), fused(x)
    assert (got - before).norm() > 0.02 * before.norm()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_weight_is_transformed_once_for_all_shapes_and_kept_beside_the_other_precisions(monkeypatch):
    fused, made, keep = resnet_fused.fuse(block()), [], folding._keep
    monkeypatch.setattr(folding, "_keep", lambda *args: made.append(args[-1].layout) or keep(*args))
    for _ in range(2):
        for size in (14, 20, 28):
            fused(images(2, 64, size, size))
    two, four = ([winograd.layout(outputs, Conv(padding=(1, 1)))] * 2 for outputs in (2, 4))
    assert made == two
    with resnet_fused.precision("fast"):
        for size in (28, 56):
            fused(images(2, 64, size, size))
    fused(images(2, 64, 14, 14))
    assert made == two + four


@torch.no_grad()
def test_bounds_go_on_behind_it():
    """Of a tensor that the package wrote a bound is known without reading it; and it holds."""
    fused, x = resnet_fused.fuse(block()), images(2, 64, 14, 14)
    with bounds.private():
        bounds.remember(x, 10.0)
        out = fused(x)
        assert out.abs().max().item() <= bounds.noted(out) < bounds.SAFE


@torch.no_grad()
def test_a_block_without_channels_is_refused_as_stock_refuses_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zero-element tensors
        fused = resnet_fused.fuse(with_statistics(Bottleneck(16, 4, base_width=0)))
    with pytest.raises(RuntimeError):  # of whichever convolution is asked first
        fused(images(2, 16, 16, 16))


@torch.no_grad()
def test_words_of_precision():
    x = images(2, 64, 56, 56)
    default, fast = resnet_fused.fuse(block()), resnet_fused.fuse(block(), precision="fast")
    assert F2 in said(default, x) and F4 not in said(default, x)
    assert F4 in said(fast, x) and F2 not in said(fast, x)
    exact = block().double()(x.double())
    two, four = default(x), fast(x)
    assert error(two, exact) < error(four, exact) < 3e-6
    with resnet_fused.precision("fast"):
        assert F4 in said(default, x) and torch.equal(default(x), four)
        with resnet_fused.precision("default"):
            assert F2 in said(fast, x) and torch.equal(fast(x), two)
    assert torch.equal(default(x), two) and torch.equal(fast(x), four)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), resnet_fused.fuse(fast)):
        assert F4 in said(copied, x)
    assert F2 in said(resnet_fused.fuse(fast, precision="default"), x)


def test_an_unknown_precision_is_refused():
    text = "unknown precision 'exact'; pass one of 'default', 'fast'"
    with pytest.raises(ValueError, match=text):
        resnet_fused.fuse(block(), precision="exact")
    with pytest.raises(ValueError, match=text), resnet_fused.precision("exact"):
        pass


def test_explain_names_it():
    model = resnet_fused.fuse(block(), precision="fast")
    text = str(resnet_fused.explain(model, (8, 64, 56, 56), training=False))
    assert f"{F4} with norm, ReLU; {F4} with norm, sum, ReLU" in text


@torch.no_grad()
def test_compiled_in_one_graph():
    torch.compiler.reset()
    fused, x = resnet_fused.fuse(block()), images(2, 64, 20, 20)
    want = fused(x)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)


def test_a_transformed_weight_is_not_taken_for_one_that_onednn_reads(monkeypatch):
    model, chosen = block(36), iter((4, 0, 2, 0))
    fused, current = resnet_fused.fuse(copy.deepcopy(model)), [0]
    monkeypatch.setattr(winograd, "folded", lambda *_: (current[0], 1.0))
    for size in (14, 15, 16, 17):  # of each, oneDNN meets the shape for the first time
        current[0] = next(chosen)
        x = images(2, 36, size, size)
        with torch.no_grad(), choose.fusing_all():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)
