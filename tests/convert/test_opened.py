"""Children of somebody's class whose forward is a chain: a block's program reaches through, while they are that."""

import copy
import pickle

import pytest
import torch
from nets import observe
from preact_blocks import F64, assert_equal
from torch import nn

import resnet_fused
from resnet_fused.convert.trace import opens
from resnet_fused.plan import choose
from resnet_fused.testing.vision import import_torchvision


class Chain(nn.Module):
    """As timm's ConvNormAct."""

    def __init__(self, inputs, outputs, kernel=1, stride=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()
        self.aa = None

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = self.aa(x)
        return x


class Averaged(nn.Module):
    """As timm's DownsampleAvg."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.Identity()

    def forward(self, x):
        return self.norm(self.conv(self.pool(x)))


class Block(nn.Module):
    """As RegNet's."""

    def __init__(self, inputs=8, outputs=12, stride=2):
        super().__init__()
        self.conv1, self.conv2 = Chain(inputs, 8), Chain(8, 8, 3, stride)
        self.conv3 = Chain(8, outputs, act=False)
        self.downsample = nn.Sequential(nn.AvgPool2d(2), Chain(inputs, outputs, act=False))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.conv3(self.conv2(self.conv1(x))) + self.downsample(x))


class PreActivated(nn.Module):
    """As timm's ResNetV2's: the projection reads what the first norm made."""

    def __init__(self, inputs=8, outputs=12, stride=2):
        super().__init__()
        self.downsample = Averaged(inputs, outputs, stride)
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(inputs, 8, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(8, outputs, 3, padding=1, bias=False)
        self.act = nn.ReLU()

    def forward(self, x):
        preact = self.act(self.norm1(x))
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(preact)
        x = self.conv1(preact)
        return self.conv2(self.act(self.norm2(x))) + shortcut


@torch.no_grad()
def scattered(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(-1, 1), module.bias.uniform_(-1, 1)
            module.running_mean.uniform_(-1, 1), module.running_var.uniform_(0.5, 2)
    return model.double()


def assert_same(fused, stock, size=7):
    """One step and an evaluation, in float64."""
    x = torch.randn(3, 8, size, size, dtype=F64).contiguous(memory_format=torch.channels_last)
    with choose.fusing_all():
        for mode in (True, False):
            assert_equal(observe(fused.train(mode), x), observe(stock.train(mode), x))
        with torch.no_grad():
            assert_equal({"evaluated": fused(x)}, {"evaluated": stock(x)})


def row_of(fused):
    return next(row for row in resnet_fused.report(fused).rows if not row.name)


def pair(kind=Block, **options):
    torch.manual_seed(0)
    stock = scattered(kind(**options))
    return stock, resnet_fused.fuse(copy.deepcopy(stock))


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        (Block, {}, "conv1.conv-conv1.bn-relu-conv2.conv-conv2.bn-relu-conv3.conv-conv3.bn + downsample.1 -> relu"),
        (PreActivated, {}, "norm1-relu-conv1-norm2-relu-conv2 + downsample"),
        (PreActivated, {"stride": 1}, "norm1-relu-conv1-norm2-relu-conv2 + downsample"),
    ],
)
@pytest.mark.parametrize("size", [6, 7])
def test_a_block_is_one_program_through_its_chains(kind, options, what, size):
    stock, fused = pair(kind, **options)
    row = row_of(fused)
    assert row.what == what and not row.reason and len(resnet_fused.report(fused).rows) == 1
    if kind is Block and size == 7:
        size = 8  # the branch rounds up where the shortcut rounds down
    assert_same(fused, stock, size)
    assert_same(pickle.loads(pickle.dumps(fused)), stock, size)
    assert resnet_fused.unfuse(fused).conv1 is fused.conv1 and not resnet_fused.report(fused).fused


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Other(Chain):
    def forward(self, x):
        return 2 * super().forward(x)


def replace_child(block):
    made = Other(8, 8, 3, 2).double()
    made.load_state_dict(block.conv2.state_dict())
    block.conv2 = made


def swap_forward(block):
    own = block.conv2
    own.forward = lambda x: 2 * Chain.forward(own, x)


CHANGES = {
    "a hook on it": lambda block: block.conv2.register_forward_hook(lambda module, args, out: 2 * out),
    "a hook before it": lambda block: block.conv2.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "a hook on the one in a Sequential": lambda block: block.downsample[1].register_forward_hook(
        lambda module, args, out: 2 * out
    ),
    "what it asks for by name": lambda block: setattr(block.conv2, "aa", Doubled()),
    "its forward": swap_forward,
    "its class": lambda block: setattr(block.conv2, "__class__", Other),
    "another in its place": replace_child,
    "a child of it": lambda block: setattr(block.conv2, "act", Doubled()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("again", [False, True])
def test_a_chain_that_was_changed_runs_as_changed(change, again):
    stock, fused = pair()
    for block in (stock, fused):
        CHANGES[change](block)
    if again:
        resnet_fused.fuse(fused)
    assert_same(fused, stock, 8)


def test_the_forward_of_its_class_replaced(monkeypatch):
    stock, fused = pair()
    before = Chain.forward
    monkeypatch.setattr(Chain, "forward", lambda self, x: 2 * before(self, x))
    assert_same(fused, stock, 8)
    assert "conv1" in row_of(fused).reason


def test_a_chain_without_the_attribute_that_it_asks_for():
    stock, fused = pair()
    for block in (stock, fused):
        del block.conv2.aa
    assert_same(fused, stock, 8)
    assert "what the forward of conv2 reads was changed" in row_of(fused).reason
    assert not row_of(resnet_fused.fuse(fused)).reason
    assert_same(fused, stock, 8)


class Added(Chain):
    def forward(self, x):
        return self.bn(self.conv(x)) + x


class Two(Chain):
    def __init__(self):
        super().__init__(8, 8)
        self.more = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.more(self.bn(self.conv(x)))


class Scaled(Chain):
    def __init__(self):
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        scale = getattr(self, "scale", None)
        return self.bn(self.conv(x)) if scale is None else self.bn(self.conv(x)) * scale


class Asking(Chain):
    def forward(self, x):
        name = "a" * 2
        return self.bn(self.conv(x)) if getattr(self, name, None) is None else x


class ByTraining(Chain):
    def forward(self, x):
        return self.bn(self.conv(x)) if getattr(self, "training", True) else self.conv(x)


class Called(Chain):
    def __call__(self, x):
        return 2 * super().__call__(x)


NO_CHAINS = [lambda: Added(8, 8), Two, Scaled, lambda: Asking(8, 8), lambda: ByTraining(8, 8), lambda: Called(8, 8)]


@pytest.mark.parametrize("make", NO_CHAINS)
def test_others_are_called(make):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.inner, self.conv2 = Chain(8, 8), make(), Chain(8, 8)

        def forward(self, x):
            return self.conv2(self.inner(self.conv1(x)))

    assert not opens(make()) and opens(Chain(8, 8))
    stock, fused = pair(Holder)
    row = row_of(fused)
    assert "[inner]" in row.what or row.reason == "inner has a __call__ of its own"
    assert_same(fused, stock)


def test_in_a_graph():
    stock, fused = pair()
    x = torch.randn(3, 8, 8, 8, dtype=F64)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert_equal({"out": compiled(x)}, {"out": stock(x)})
    fused.conv2.aa = stock.conv2.aa = Doubled()
    assert_equal({"out": compiled(x)}, {"out": stock(x)})


@pytest.mark.parametrize("name", ["resnetv2_18", "resnetv2_50d"])
def test_timms_preactivated_blocks(name):
    try:
        import_torchvision()
        import timm
    except ImportError as error:
        pytest.skip(f"timm or torchvision is not installed: {error}")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, layers=(1, 1, 1, 1), channels=(16, 24, 32, 40), stem_chs=8)
    stock = scattered(model)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    rows = [row for row in resnet_fused.report(fused).fused if row.kind.startswith("PreAct")]
    assert len(rows) == 4 and all(row.what.startswith("norm1") and row.what.endswith("+ downsample") for row in rows)
    assert not any(row.reason for row in rows)
    x = torch.randn(3, 3, 64, 64, dtype=F64)
    with choose.fusing_all():
        for mode in (True, False):
            assert_equal(observe(fused.train(mode), x), observe(stock.train(mode), x))
