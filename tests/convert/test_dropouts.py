"""Dropout in blocks: called where it draws, between two programs; nothing where it does not."""

import copy

import pytest
import torch
from nets import observe
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.models import BasicBlock, CifarPlainNet, CifarResNet, PreActBasicBlock, WideBlock, WideResNet

F64 = torch.float64


class Functional(PreActBasicBlock):
    """Dropout as a function, as in much code for Wide ResNets."""

    def __init__(self, *args, p=0.5):
        super().__init__(*args)
        self.p = p

    def forward(self, x):
        out = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        out = self.relu(self.bn2(self.conv1(out)))
        if self.p > 0:
            out = F.dropout(out, p=self.p, training=self.training)
        return torch.add(identity, self.conv2(out))


class Early(PreActBasicBlock):
    """Dropout behind the first convolution, before its norm; an empty shortcut."""

    def __init__(self, *args, p=0.5):
        super().__init__(*args)
        self.dropout = nn.Dropout(p)
        self.shortcut = nn.Sequential() if self.downsample is None else nn.Sequential(self.downsample)
        self.downsample = None

    def forward(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        out += self.shortcut(x)
        return out


class Late(BasicBlock):
    """Dropout of whole channels in the branch of a block whose norms stand behind."""

    def __init__(self, *args, p=0.5):
        super().__init__(*args)
        self.dropout = nn.Dropout2d(p)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.dropout(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(self.conv2(out)) + identity)


def wide(*args, p=0.5):
    return WideBlock(*args, dropout_rate=p)


KINDS = {"wide": wide, "functional": Functional, "early": Early, "late": Late}
ACTIVE = {
    "wide": "bn1-relu-conv1-bn2-relu, [dropout], conv2 + x",
    "functional": "bn1-relu-conv1-bn2-relu, [dropout], conv2 + x",
    "early": "[bn1], [relu], [conv1], [dropout], [shortcut], bn2-relu-conv2 + shortcut",
    "late": "conv1-bn1-relu, [dropout], conv2-bn2 + x -> relu",
}
QUIET = dict.fromkeys(("wide", "functional", "early"), "bn1-relu-conv1-bn2-relu-conv2 + x")
QUIET["late"] = "conv1-bn1-relu-conv2-bn2 + x -> relu"


def scattered(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.double()


def made(kind, projects=False, **options):
    torch.manual_seed(0)
    shortcut = None
    if projects:
        shortcut = nn.Conv2d(6, 8, 1, 2, bias=False)
        shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(8)) if kind == "late" else shortcut
    block = KINDS[kind](*((6, 8, 2, shortcut) if projects else (8, 8)), **options)
    if kind == "early" and not projects:
        assert not len(block.shortcut)
    return scattered(block), torch.randn(4, 6 if projects else 8, 6, 6, dtype=F64)


def assert_equal(fused, stock, x, rtol=1e-9):
    got, got_state = observe(fused, x), torch.get_rng_state()
    want, want_state = observe(stock, x), torch.get_rng_state()
    assert got.keys() == want.keys() and torch.equal(got_state, want_state)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def what(fused):
    return resnet_fused.report(fused).fused[0].what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projects", [False, True], ids=["identity", "projection"])
def test_same_draws_and_numbers(kind, projects):
    stock, x = made(kind, projects)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    if not projects:
        assert what(fused) == ACTIVE[kind]
    assert_equal(fused, stock, x)
    assert_equal(fused.eval(), stock.eval(), x)
    if not projects:
        assert what(fused) == QUIET[kind]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x))
    for _ in range(2):  # back and forth
        assert_equal(fused.train(), stock.train(), x)


@pytest.mark.parametrize("kind", ["wide", "early", "late"])
def test_the_modules_are_asked_at_each_call(kind):
    stock, x = made(kind)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    for p in (0.0, 0.3, 1.0):
        fused.dropout.p = stock.dropout.p = p
        assert_equal(fused, stock, x)
        assert what(fused) == (ACTIVE if p else QUIET)[kind]
    fused.dropout.eval(), stock.dropout.eval()
    assert_equal(fused, stock, x)
    assert what(fused) == QUIET[kind]
    for block in (fused, stock):
        block.eval().dropout.train().p = 0.5  # Monte Carlo dropout
    assert_equal(fused, stock, x)
    with torch.no_grad():
        torch.manual_seed(1)
        want = stock(x)
        torch.manual_seed(1)
        torch.testing.assert_close(fused(x), want)
    for block in (fused, stock):
        block.dropout.p = 1.5
        with pytest.raises(ValueError, match="between 0 and 1, but got"):
            block(x)


def test_hooks_and_replacements_of_a_quiet_dropout_are_run():
    stock, x = made("wide")
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    for block in (fused.eval(), stock.eval()):
        block.dropout.register_forward_hook(lambda module, args, out: 2 * out)
    assert_equal(fused, stock, x)
    for block in (fused, stock):
        block.dropout = nn.Tanh()
    assert_equal(fused, stock, x)


@pytest.mark.parametrize("kind", ["wide", "functional"])
def test_a_function_that_somebody_replaced_is_called(kind, monkeypatch):
    stock, x = made(kind)
    fused = resnet_fused.fuse(copy.deepcopy(stock)).eval()
    fused(x)
    monkeypatch.setattr(F, "dropout", lambda x, *args, **named: 3 * x)
    assert_equal(fused, stock.eval(), x)


def test_an_empty_shortcut_that_gets_a_module():
    stock, x = made("early")
    fused = resnet_fused.fuse(copy.deepcopy(stock)).eval()
    assert what(fused) == QUIET["early"]
    for block in (fused, stock.eval()):
        block.shortcut.append(nn.Tanh())
    assert_equal(fused, stock, x)


@pytest.mark.parametrize("shape", [(4, 1, 6, 6), (1, 8, 6, 6), (4, 8, 6, 1)])
def test_a_residual_that_is_broadcast_to_a_convolution(shape):
    class Adds(PreActBasicBlock):
        def forward(self, x):
            out = self.conv1(self.relu(self.bn1(x)))
            return self.conv2(self.relu(self.bn2(out))) + self.downsample(x)

    class Cuts(nn.Module):
        def forward(self, x):
            return x[: shape[0], : shape[1], : shape[2], : shape[3]]

    stock = scattered(Adds(8, 8, 1, Cuts()))
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), torch.randn(4, 8, 6, 6, dtype=F64)
    assert_equal(fused, stock, x)


NETWORKS = {
    "option A": lambda: CifarResNet(BasicBlock, (1, 2, 1)),
    "option B": lambda: CifarResNet(BasicBlock, (1, 2, 1), shortcut="B"),
    "plain": lambda: CifarPlainNet((1, 2, 1)),
    "wide": lambda: WideResNet(10, 1),
    "wide, dropout": lambda: WideResNet(10, 2, 0.3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    torch.manual_seed(0)
    stock = scattered(NETWORKS[name]())
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), torch.randn(3, 3, 12, 13, dtype=F64)
    rows = [row for row in resnet_fused.report(fused).fused if row.name]
    every = len(stock.layer1) + len(stock.layer2) + len(stock.layer3)
    whole = [row for row in rows if row.convolutions.fused == row.convolutions.total]
    assert len(rows) == every and len(whole) == (0 if "dropout" in name else every)
    for _ in range(2):
        assert_equal(fused, stock, x, rtol=1e-7)
    assert_equal(fused.eval(), stock.eval(), x, rtol=1e-7)
    assert all(" [" not in row.what.replace("[downsample]", "") for row in resnet_fused.report(fused).fused if row.name)
