"""Batch norms with activations other than ReLU behind them through ``fuse``: modules, functions, inside a norm."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.blocks.runtime import fused_programs
from resnet_fused.testing.vision import import_torchvision

F64 = torch.float64
MODULES = {
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "leaky relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "hardswish": nn.Hardswish,
    "hardswish in place": lambda: nn.Hardswish(inplace=True),
    "relu6": nn.ReLU6,
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
}


class Inverted(nn.Module):
    """A block of MobileNet's kind: 1x1, depthwise 3x3, 1x1, sum."""

    def __init__(self, make, groups=12):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), make()
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1, groups=groups, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(12), make()
        self.conv3, self.bn3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return x + self.bn3(self.conv3(y))


class Functions(nn.Module):
    """Two blocks whose activations are functions with arguments."""

    def __init__(self):
        super().__init__()
        for i in range(1, 6):
            self.add_module(f"conv{i}", nn.Conv2d(6, 6, 3, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(6))

    def forward(self, x):
        x = F.silu(self.bn1(self.conv1(x)), inplace=True)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.3)
        x = F.gelu(self.bn3(self.conv3(x)), approximate="tanh")
        x = F.hardswish(self.bn4(self.conv4(x)))
        return F.relu6(self.bn5(self.conv5(x)), True)


def scattered(model):
    """`model` in float64 with batch norms that do something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.5, 0.5), nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(F64, memory_format=torch.channels_last)


def image(dtype=F64, channels=6):
    x = torch.randn(3, channels, 9, 7, generator=torch.Generator().manual_seed(1), dtype=F64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def observed(model, x):
    """Output, gradients by name, and buffers, after a step."""
    x = x.clone().requires_grad_()
    leaves = {"input": x, **dict(model.named_parameters())}
    out = model(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=F64).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True)), **dict(model.named_buffers())}


def assert_same(fused, stock, x, runs=None):
    before = fused_programs()
    with resnet_fused.use("cpu"):
        got = observed(fused, x)
    ran, want = fused_programs() - before, observed(stock, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert runs is None or ran == runs


def pair(model):
    model = scattered(model)
    return resnet_fused.fuse(copy.deepcopy(model)), model


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


def leaky(slope):
    return lambda: nn.LeakyReLU(slope)


class Louder(nn.SiLU):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("make", [leaky(-0.5), leaky(1.5), Louder, nn.ELU, nn.Mish], ids=str)
def test_others_stay_stock(make):
    fused, stock = pair(Inverted(make, 1))
    assert "leaky" not in str(resnet_fused.report(fused))
    assert_same(fused, stock, image())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name, setting",
    [
        ("leaky relu", {"negative_slope": 0.7}),
        ("leaky relu", {"negative_slope": -0.7}),
        ("gelu", {"approximate": "tanh"}),
        ("relu6", {"max_val": 3.0}),
    ],
)
def test_a_setting_that_changes_after_fuse_counts(name, setting, training):
    fused, stock = pair(Inverted(MODULES[name], 1))
    fused.train(training), stock.train(training)
    assert_same(fused, stock, image(), runs=1)
    for model in (fused, stock):
        vars(model.act2).update(setting)
    for _ in range(2):
        assert_same(fused, stock, image())


def test_hooks_on_an_activation_run():
    fused, stock = pair(Inverted(nn.SiLU, 1))
    seen = []
    fused.act2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert_same(fused, stock, image())
    assert seen == [torch.Size((3, 12, 9, 7))]


def test_a_method_on_an_activation_runs():
    fused, stock = pair(Inverted(nn.Hardswish, 1))
    for model in (fused, stock):
        model.act1.forward = torch.tanh
    assert_same(fused, stock, image())


@pytest.mark.parametrize("function", ["silu", "hardtanh"])
def test_an_exchanged_function_is_called(function, monkeypatch):
    fused, stock = pair(Inverted(nn.SiLU if function == "silu" else nn.ReLU6, 1))
    assert_same(fused, stock, image(), runs=1)
    monkeypatch.setattr(F, function, lambda x, *args, **kwargs: torch.tanh(x))
    assert_same(fused, stock, image())


def test_an_exchanged_function_of_a_forward_is_called(monkeypatch):
    fused, stock = pair(Functions())
    monkeypatch.setattr(F, "gelu", lambda x, **kwargs: torch.tanh(x))
    assert_same(fused, stock, image())


class Optional(nn.Module):
    """A forward that asks for a child that there may be, as timm's ConvNormAct does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.1)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = self.aa(x)
        return x


@pytest.mark.parametrize("later", [None, nn.Tanh(), torch.tanh])
def test_a_child_that_there_may_be(later):
    fused, stock = pair(Optional())
    assert_same(fused, stock, image(), runs=1)
    for model in (fused, stock):
        model.aa = later
    for _ in range(2):
        assert_same(fused, stock, image())


class Asking(Optional):
    """One that asks for what is no child, constant or nothing."""

    def helper(self, x):
        return x * 2

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return getattr(self, "helper")(x)  # noqa: B009


def test_a_method_that_is_asked_for_is_not_traced():
    fused, stock = pair(Asking())
    assert "fused: conv" not in str(resnet_fused.report(fused))
    assert_same(fused, stock, image(), runs=0)


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
    torch.testing.assert_close(compiled(x), stock(x), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stock(x), rtol=1e-9, atol=1e-9)
