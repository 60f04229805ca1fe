"""Forwards in which a chain, run where its last node was, could read or draw something else than stock."""

import copy
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import resnet_fused


def relu(x):  # by a known name, but not PyTorch's
    return x.clamp(0, 0.5)


class Block(nn.Module):
    """Two convolutions; what happens to the shortcut meanwhile is the subclass's affair."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.act, self.drop = nn.ReLU(inplace=True), nn.ReLU(), nn.Dropout(0.5)
        self.drop1 = nn.Dropout(0.25)
        self.pool, self.norm = nn.MaxPool2d(3, 1, 1), nn.Sequential(self.bn2)
        self.calls = 0


class ReluInPlace(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        shortcut = self.relu(x)
        return self.act(out + shortcut)


class FunctionalInPlace(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        shortcut = F.relu(x, True)
        return self.act(out + shortcut)


class MethodInPlace(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        x.add_(1.0)
        out = self.bn2(self.conv2(self.act(out)))
        return self.act(out + x)


class OperatorInPlace(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        x += 1.0
        out = self.bn2(self.conv2(self.act(out)))
        return self.act(out)


class ThroughAView(Block):
    def forward(self, x):
        flat = x.view(x.shape)
        out = self.bn1(self.conv1(x))
        flat.add_(1.0)
        return self.act(self.bn2(self.conv2(self.act(out))))


class IntoTheShortcut(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        x += out
        return self.act(x)


class NormTwice(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out = self.bn1(self.conv2(self.act(out)))
        return self.act(out + x)


class NormOnTheShortcut(Block):
    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act(out + self.norm(x))


class DropoutOnTheShortcut(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(out + self.drop(x))


class DropoutOnBothBranches(Block):
    def forward(self, x):
        out = self.drop1(self.act(self.bn1(self.conv1(x))))
        shortcut = self.drop(x)
        return self.act(self.bn2(self.conv2(out)) + shortcut)


class Noise(nn.Module):
    def forward(self, weight):
        return weight + 0.1 * torch.randn_like(weight)


class RandomWeight(Block):
    """The convolution draws its weight before the shortcut draws; the sum is behind both."""

    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self.conv1, "weight", Noise(), unsafe=True)

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.act(out + self.drop(x))


class BothOperators(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x + 1.0)))))
        x += out
        return self.act(x)


class Counting(Block):
    def forward(self, x):
        self.calls = self.calls + 1
        return self.act(self.bn1(self.conv1(x)) + x)


class OwnRelu(Block):
    def forward(self, x):
        return relu(self.bn1(self.conv1(x)) + x)


class BroadcastOntoConvolution(Block):
    def forward(self, x):
        shortcut = torch.mean(x, (2, 3), True)
        return self.conv2(self.act(self.bn1(self.conv1(x)))) + shortcut


class PooledShortcut(Block):  # nothing here stands in the way
    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(out + self.pool(x))


KINDS = [
    ReluInPlace, FunctionalInPlace, MethodInPlace, OperatorInPlace, ThroughAView, IntoTheShortcut, NormTwice,
    NormOnTheShortcut, DropoutOnTheShortcut, DropoutOnBothBranches, RandomWeight, BothOperators, Counting,
    OwnRelu, BroadcastOntoConvolution, PooledShortcut,
]  # fmt: skip


def outcome(model, training):
    """What a call gives and leaves behind, and the gradients, or the error in their place."""
    model.train(training).zero_grad()
    torch.manual_seed(3)
    leaf = torch.randn(3, 6, 7, 7, dtype=torch.double, requires_grad=True)
    x = leaf.contiguous(memory_format=torch.channels_last) * 1.0
    found = {"out": model(x), "x": x.detach(), "calls": torch.tensor(model.calls)}
    try:
        (found["out"] * torch.linspace(-1, 1, found["out"].numel(), dtype=torch.double).view_as(found["out"])).sum().backward()  # fmt: skip  # noqa: E501
    except RuntimeError as error:
        return found | {"error": type(error)} | dict(model.named_buffers())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"leaf": leaf.grad} | grads | dict(model.named_buffers())


@pytest.mark.filterwarnings("ignore:fuse. nothing to fuse")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_same_as_stock(kind, training):
    stock = kind().double()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    want, got = outcome(stock, training), outcome(fused, training)
    assert got.keys() == want.keys()
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert got[name] is value


def test_draws_go_to_the_elements_that_stock_gives_them():
    """Dropout draws in the order in which its input lies in memory."""
    stock = DropoutOnBothBranches().double()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    assert resnet_fused.report(fused).fused
    x, outs = torch.randn(3, 6, 7, 7, dtype=torch.double), []
    for model in (stock, fused):
        torch.manual_seed(3)
        outs.append(model(x))
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)


def test_what_is_harmless_is_one_chain():
    for kind in (PooledShortcut, DropoutOnTheShortcut):
        (row,) = resnet_fused.report(resnet_fused.fuse(kind())).fused
        assert row.what.startswith("[") and "conv1-bn1-relu-conv2-bn2 + " in row.what, row


@pytest.mark.parametrize("change", ["hook", "class", "inplace"])
def test_a_module_within_a_chain_that_changes_later(change):
    stock = PooledShortcut().double()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        if change == "hook":
            model.pool.register_forward_hook(lambda module, args, out: (args[0].mul_(2.0), None)[1])
        elif change == "class":
            model.pool = nn.ReLU(inplace=True)
        else:
            model.pool = nn.Sequential(nn.Identity())
            model.pool.forward = lambda x: x.add_(1.0)
    want, got = outcome(stock, False), outcome(fused, False)
    torch.testing.assert_close(got["out"], want["out"], rtol=1e-9, atol=1e-9)


def test_in_place_operators_are_told_from_the_others():
    from resnet_fused.convert.trace import trace

    assert operator.iadd in [node.target for node in trace(OperatorInPlace(), OperatorInPlace).nodes]
    assert operator.add in [node.target for node in trace(PooledShortcut(), PooledShortcut).nodes]
    assert [n.target for n in trace(BothOperators(), BothOperators).nodes if n.op == "call_function"] == [
        operator.add, operator.iadd,
    ]  # fmt: skip
