"""The max pool behind a stem: in the chain where that is the same, called where somebody watches or sizes are odd."""

import copy
import pickle

import pytest
import torch
from chains import Chain, Step, chain_output, run_chain
from nets import assert_same, images, observe
from torch import nn

import resnet_fused
from resnet_fused.steps import Conv, Norm, Pool, StepTensors


class Traced(nn.Module):
    """A stem in a block that can be traced."""

    def __init__(self, pool=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.relu = nn.Conv2d(3, 9, 7, 2, 3, bias=False), nn.BatchNorm2d(9), nn.ReLU(inplace=True)
        self.pool = pool or nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


class Rewritten(Traced):
    """A stem in a method of a model whose forward cannot be traced."""

    def stem(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        x = self.pool(x)
        return x

    def forward(self, x):
        return self.stem(x) if x.shape[0] > 0 else x


KINDS = pytest.mark.parametrize("kind", [Traced, Rewritten])


def pooled(model, x):
    """Whether the pool ran in a chain: whether autograd knows no pool of its own."""
    todo, names = [model(x).sum().grad_fn], set()
    while todo:
        node = todo.pop()
        names.add(node.name())
        todo += [following for following, _ in node.next_functions if following is not None]
    assert "FusedProgramBackward" in names
    return not any("Pool" in name for name in names)


@KINDS
@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (3, 1, 1), ((3, 2), (2, 1), (1, 0))], ids=str)
def test_equals_stock(kind, pool):
    stock = kind(nn.MaxPool2d(*pool))
    fused = resnet_fused.fuse(copy.deepcopy(stock), strict=True)
    assert "pool" in str(resnet_fused.report(fused))
    x = images(3, 3, 33)
    assert pooled(copy.deepcopy(fused), x)
    assert_same(observe(fused, x), observe(stock, x))
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)
    assert_same(observe(fused, x), observe(stock, x))  # frozen batch norm, with gradients


@KINDS
def test_called_where_it_must_be(kind):
    x = images(2, 3, 20)
    for pool in (nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(3, 2, 1, dilation=2), nn.AvgPool2d(3, 2, 1)):
        stock = kind(pool)
        fused = resnet_fused.fuse(copy.deepcopy(stock))
        assert not pooled(copy.deepcopy(fused), x)
        assert_same(observe(fused, x), observe(stock, x))
    fused = resnet_fused.fuse(kind())
    seen = []
    handle = fused.pool.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fused(x)
    assert seen == [(2, 9, 5, 5)]
    handle.remove()
    assert pooled(copy.deepcopy(fused), x)
    fused.pool = nn.Identity()
    assert fused(x).shape == (2, 9, 10, 10)


@KINDS
def test_errors_are_stocks(kind):
    fused = resnet_fused.fuse(kind(nn.MaxPool2d(7, 2)))
    with pytest.raises(RuntimeError, match="utput size is too small"):
        fused(images(2, 3, 8))


@KINDS
def test_nan_and_ties(kind):
    """A NaN wins its windows; of equal values, zeros of the ReLU above all, the first does."""
    stock = kind()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    stock.eval(), fused.eval()
    x = images(2, 3, 24)
    x[1, 0, 11, 11] = torch.nan
    x[0] = 0.0
    got, want = observe(fused, x), observe(stock, x)
    for name in ("out", "x"):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name
        torch.testing.assert_close(got[name].nan_to_num(), want[name].nan_to_num(), rtol=1e-4, atol=1e-5)


@KINDS
def test_copies(kind):
    fused = resnet_fused.fuse(kind())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert pooled(other, images(2, 3, 20))
    assert type(resnet_fused.unfuse(fused)) is kind


def test_less_is_kept_for_backward():
    """Neither the activation nor int64 indices."""
    stock = Traced()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    x, saved = images(2, 3, 64), {}
    for name, model in (("stock", stock), ("fused", fused)):
        sizes = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.untyped_storage()._cdata: t.untyped_storage().nbytes()}) or t,
            lambda t: t,
        )
        with hooks:
            out = model(x)
        saved[name] = sum(sizes.values())
        del out
    activation = 2 * 9 * 32 * 32 * 4
    assert saved["stock"] - saved["fused"] > activation + 2 * 9 * 16 * 16 * 7 - 1024  # vectors


def test_double_backward_and_gradients():
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    weight, gamma, beta, x = leaf(4, 2, 3, 3), leaf(4), leaf(4), leaf(2, 2, 9, 8)
    step = Step(Conv((1, 1), (1, 1)), Norm())

    def run(function):
        def out(x, weight, gamma, beta):
            chain = Chain((step,), pool=Pool())
            return function(chain, x, [StepTensors(weight, None, gamma, beta)])

        return out

    ours, stock = run(run_chain), run(lambda chain, x, tensors: chain_output(chain, x, None, None, tensors))
    inputs = (x, weight, gamma, beta)
    torch.testing.assert_close(ours(*inputs), stock(*inputs), rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(ours(*inputs))
    for a, b in zip(*(torch.autograd.grad(f(*inputs), inputs, cotangent) for f in (ours, stock)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradgradcheck(ours, inputs)
