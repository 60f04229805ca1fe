"""Average pools: between dense blocks, taken before the convolution there, in ResNet-D's shortcuts, and inside."""

import copy

import pytest
import torch
from nets import assert_same, observe
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.blocks import runtime

F64 = torch.float64


class Transition(nn.Sequential):
    """Between dense blocks, as torchvision and timm have it."""

    def __init__(self, pool=None, conv=None):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.conv = conv or nn.Conv2d(6, 4, 1, bias=False)
        self.pool = pool or nn.AvgPool2d(2, 2)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias, 0, 0.3)


class Functional(nn.Module):
    """The same in a forward of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, bias=True)

    def forward(self, x):
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class Strided(Functional):
    """With everything said, and windows that overlap."""

    def forward(self, x):
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), (3, 2), stride=(1, 2), padding=0, ceil_mode=False)


class Padded(Functional):
    def forward(self, x):
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2, 2, 1)


class Downsampling(nn.Module):
    """The first bottleneck of a stage of ResNet-D; its 3x3 convolution strided, or averaged behind."""

    def __init__(self, shortcut=None, aa=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1 if aa else 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.aa = nn.AvgPool2d(2) if aa else nn.Identity()
        pool = shortcut or nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.downsample = nn.Sequential(pool, nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.aa(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


def images(size=8, channels=6):
    return torch.randn(3, channels, size, size + 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def everything():
    """On a CPU all of this is small."""
    with resnet_fused.use("cpu" if resnet_fused.library.status().cpu.loaded else "reference"):
        yield


@pytest.fixture
def fused_programs(monkeypatch):
    """A function that tells how many programs ran since it was asked before."""
    seen = [runtime.fused_programs()]

    def count():
        seen.append(runtime.fused_programs())
        return seen[-1] - seen[-2]

    return count


def check(stock, x, fused_programs, programs=1):
    """Training, evaluation with gradients and evaluation, in float64, are stock's."""
    stock, x = stock.to(F64), x.to(F64)
    fused = resnet_fused.fuse(copy.deepcopy(stock), strict=True)
    fused_programs()
    for mode in (True, False):
        stock.train(mode), fused.train(mode)
        assert_same(observe(fused, x), observe(stock, x), 1e-9, 1e-9)
        assert fused_programs() == programs
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-9, atol=1e-9)
    assert fused_programs() == programs
    return fused


@pytest.mark.parametrize("kind", [Transition, Functional, Strided])
@pytest.mark.parametrize("size", [8, 7])
def test_a_transition_is_one_program(everything, fused_programs, kind, size):
    fused = check(kind(), images(size), fused_programs)
    assert "1 of 1 convolutions, 2 of 2 passes" in str(resnet_fused.report(fused))


@pytest.mark.parametrize(
    ("pool", "conv"),
    [
        (nn.AvgPool2d(2, 2, 1), None),
        (nn.AvgPool2d(2, 2, ceil_mode=True), None),
        (nn.AvgPool2d(2, 2, divisor_override=3), None),
        (nn.AvgPool2d((2, 2), padding=(0, 1)), None),
        (None, nn.Conv2d(6, 4, 3, padding=1)),
        (None, nn.Conv2d(6, 4, 1, stride=2)),
        (None, nn.Conv2d(6, 4, 1, groups=2)),
        (nn.MaxPool2d(2), None),
        (nn.AdaptiveAvgPool2d(4), None),
    ],
    ids=lambda m: str(m).replace("\n", ""),
)
def test_what_does_not_commute_is_left(pool, conv):
    stock = Transition(pool, conv)
    with pytest.warns(UserWarning, match="nothing|less"):
        fused = resnet_fused.fuse(copy.deepcopy(stock))
    assert type(fused) is Transition
    assert_same(observe(fused, images()), observe(stock, images()), 0, 0)


@pytest.mark.parametrize("odd", [2.0, (2, 2, 2), (2, 2.0), "2", (0, 2)], ids=str)
def test_what_is_no_size_fails_as_stock(odd):
    stock = Transition(nn.AvgPool2d(odd, 2))
    with pytest.warns(UserWarning, match="nothing|less"):
        fused = resnet_fused.fuse(copy.deepcopy(stock))
    changed, said = resnet_fused.fuse(Transition(), strict=True), []
    changed.pool.kernel_size = odd
    for model in (stock, fused, changed):
        with pytest.raises((RuntimeError, TypeError)) as error:
            model(images())
        said.append(type(error.value))
    assert said[0] is said[1] is said[2]


def test_a_function_with_padding_is_left():
    with pytest.warns(UserWarning, match="nothing|less"):
        assert type(resnet_fused.fuse(Padded())) is Padded


@pytest.mark.parametrize(("aa", "size"), [(False, 8), (False, 7), (True, 8)])
def test_an_averaged_shortcut_is_part_of_its_block(everything, fused_programs, aa, size):
    fused = check(Downsampling(aa=aa), images(size), fused_programs)
    text = "conv1-bn1-relu-conv2-bn2-relu-aa-conv3-bn3" if aa else "conv1-bn1-relu-conv2-bn2-relu-conv3-bn3"
    assert f"{text} + downsample -> relu; 4 of 4" in str(resnet_fused.report(fused))


def changed(model, how):
    if how == "settings":
        model.pool.padding = 1
    elif how == "a tuple":
        model.pool.kernel_size, model.pool.stride = (2, 3), (1, 2)
    elif how == "parts of windows":
        model.pool.ceil_mode = True
    elif how == "another pool":
        model.pool = nn.MaxPool2d(2)
    elif how == "another convolution":
        torch.manual_seed(1)
        model.conv = nn.Conv2d(6, 4, 3, padding=1).to(F64)
    elif how == "a hook":
        model.pool.register_forward_hook(lambda module, args, out: out + 1)
    elif how == "a method":
        model.pool.forward = lambda x: F.avg_pool2d(x, 2) * 2
    return model


HOW = ["settings", "a tuple", "parts of windows", "another pool", "another convolution", "a hook", "a method"]


@pytest.mark.parametrize("how", HOW)
def test_changes_after_fuse_are_seen(everything, how):
    stock = Transition().to(F64)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock), strict=True), images(7).to(F64)
    for _ in range(2):
        observe(fused, x), observe(stock, x)  # what is kept of the modules is, by now
    changed(stock, how), changed(fused, how)
    assert_same(observe(fused, x), observe(stock, x), 1e-9, 1e-9)
    stock.eval(), fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", ["avg_pool2d", "relu"])
def test_replaced_functions_are_called(everything, monkeypatch, function):
    fused, original = resnet_fused.fuse(Functional().to(F64), strict=True), getattr(F, function)
    before = fused(images().to(F64))
    monkeypatch.setattr(F, function, lambda *args, **kwargs: original(*args, **kwargs) * 2)
    assert not torch.allclose(fused(images().to(F64)), before)


def test_frozen_parts(everything, fused_programs):
    for names in (["norm.weight", "norm.bias"], ["conv.weight"]):
        stock = Transition().to(F64)
        for name in names:
            stock.get_parameter(name).requires_grad_(False)
        fused = resnet_fused.fuse(copy.deepcopy(stock), strict=True)
        for x in (images().to(F64).requires_grad_(), images().to(F64)):
            fused_programs()
            for model in (fused, stock):
                model.zero_grad()
                x.grad = None
                model(x).square().sum().backward()
                model.seen = x.grad, {name: p.grad for name, p in model.named_parameters()}
            assert fused_programs() == 1
            torch.testing.assert_close(fused.seen, stock.seen, rtol=1e-9, atol=1e-9)


def test_differentiated_twice(everything):
    stock = Transition().to(F64)
    fused, found = resnet_fused.fuse(copy.deepcopy(stock), strict=True), []
    for model in (fused, stock):
        x = images().to(F64).requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_an_image_too_small_raises_as_stock(everything):
    stock, x = Transition(), torch.randn(2, 6, 1, 4)
    fused = resnet_fused.fuse(copy.deepcopy(stock), strict=True)
    said = []
    for model in (fused, stock):
        with pytest.raises(RuntimeError) as error:
            model(x)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_float32_is_as_exact_as_stock(shift):
    """Errors against float64, medians over draws: an average before a convolution rounds elsewhere, not more."""
    torch.manual_seed(0)
    errors = {"fused": [], "stock": []}
    for _ in range(5):
        stock = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1, bias=False), nn.AvgPool2d(2, 2))
        stock = stock.to(memory_format=torch.channels_last)
        x = (torch.randn(4, 64, 16, 16) + shift).contiguous(memory_format=torch.channels_last)
        wide = observe(copy.deepcopy(stock).double(), x.double())
        with resnet_fused.use("cpu" if resnet_fused.library.status().cpu.loaded else "reference"):
            own = observe(resnet_fused.fuse(copy.deepcopy(stock), strict=True), x)
        for name, seen in (("fused", own), ("stock", observe(stock, x))):
            errors[name].append(
                [float((seen[key] - wide[key]).norm()) for key in wide if wide[key].is_floating_point()]
            )
    fused, stock = (torch.tensor(errors[name]).median(0).values for name in ("fused", "stock"))
    assert (fused <= 2 * stock + 1e-6).all(), (fused, stock)
