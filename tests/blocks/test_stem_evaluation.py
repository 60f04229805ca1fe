"""A stem in evaluation on a CPU: one pass with its pool, of parameters as they are, with what stock makes of them."""

import copy
import re

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.models import resnet18
from resnet_fused.plan import choose
from resnet_fused.steps import stem

pytestmark = pytest.mark.skipif(not stem.IS_BUILT, reason="no compiled library for AVX2 or AVX-512")
ONE_PASS = "convolution of few channels and pool in one pass with norm, ReLU"


class Model(nn.Module):
    """A stem in a method that cannot be traced."""

    def __init__(self, outputs=64, pool=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, outputs, 7, 2, 3, bias=False), nn.BatchNorm2d(outputs)
        self.relu, self.pool = nn.ReLU(inplace=True), pool or nn.MaxPool2d(3, 2, 1)
        for vector in (self.bn.weight, self.bn.bias, self.bn.running_mean):
            nn.init.normal_(vector)
        nn.init.uniform_(self.bn.running_var, 0.5, 2)

    def forward(self, x):
        if x.shape[0] > 7:
            raise ValueError("too many")
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        x = self.pool(x)
        return x


def pair(**options):
    stock = Model(**options).to(memory_format=torch.channels_last).eval()
    return stock, resnet_fused.fuse(copy.deepcopy(stock))


def images(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def said(model, x):
    """The output, and what the plan said of it."""
    with choose.observing() as notes, choose.fusing_all():
        out = model(x)
    return out, "; ".join(notes)


@torch.no_grad()
def close(stock, fused, x):
    with choose.fusing_all():
        got, expected = fused(x), stock(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.stride() == expected.stride()


@torch.no_grad()
def test_error_beside_stocks():
    stock, fused = pair()
    x = images(3, 3, 65, 70)
    exact = copy.deepcopy(stock).double()(x.double())
    out, text = said(fused, x)
    assert ONE_PASS in text
    assert (out - exact).abs().max() <= 2 * (stock(x) - exact).abs().max()


def test_a_whole_model():
    torch.manual_seed(0)
    stock = resnet18(num_classes=10).to(memory_format=torch.channels_last).eval()
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), images(2, 3, 96, 80)
    assert ONE_PASS in said(fused, x)[1]
    for _ in range(7):
        close(stock, fused, x)


def test_writes_that_bypass_version_counters_are_seen():
    stock, fused = pair()
    x = images(2, 3, 33, 30)
    for write in (
        lambda m: m.conv.weight.data.mul_(2),
        lambda m: m.bn.running_mean.numpy().__iadd__(1),
        lambda m: m.bn.weight.data.neg_(),
    ):
        for _ in range(7):
            close(stock, fused, x)
        for model in (stock, fused):
            write(model)
        close(stock, fused, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bn.double(),
        lambda m: m.conv.to(memory_format=torch.contiguous_format),
        lambda m: setattr(m.bn, "weight", nn.Parameter(torch.randn(128)[::2])),
        lambda m: setattr(m.bn, "eps", 0.5),
        lambda m: setattr(m.pool, "ceil_mode", True),
        lambda m: setattr(m.pool, "dilation", 2),
        lambda m: m.pool.register_forward_hook(lambda module, args, out: out + 1),
        lambda m: setattr(m.conv, "dilation", (2, 2)),
        lambda m: m.double(),
    ],
    ids=["norm in double", "contiguous", "strided vector", "eps", "ceil", "dilated pool", "hook", "dilated", "double"],
)
def test_changes_between_calls(change):
    stock, fused = pair()
    x = images(2, 3, 45, 38)
    for _ in range(7):
        close(stock, fused, x)
    torch.manual_seed(1)
    change(stock)
    torch.manual_seed(1)
    change(fused)
    x = x.to(stock.conv.weight.dtype)
    try:
        with torch.no_grad():
            stock(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))), torch.no_grad():
            fused(x)
        return
    close(stock, fused, x)


def test_inputs_of_all_kinds():
    stock, fused = pair()
    for x in (images(2, 3, 45, 38).contiguous(), images(0, 3, 45, 38), images(1, 3, 224, 224), images(1, 3, 5, 5)):
        close(stock, fused, x)
    x = images(2, 3, 45, 38)
    x[0, 1, 0, 0], x[1, 2, 20, 20] = torch.nan, torch.inf
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4, equal_nan=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(fused(x[:1, :, 3:]), stock(x[:1, :, 3:]), rtol=2e-2, atol=2e-2)


def test_images_too_small_fail_as_in_stock():
    stock, fused = pair(pool=nn.MaxPool2d(5, 2, 0))
    for model in (stock, fused):
        with pytest.raises(RuntimeError, match="Output size is too small"), torch.no_grad(), choose.fusing_all():
            model(images(1, 3, 7, 7))


@pytest.mark.parametrize("outputs", [9, 20])
def test_tails_of_vectors_are_folded(outputs):
    stock, fused = pair(outputs=outputs)
    x = images(2, 3, 45, 38)
    assert ONE_PASS not in said(fused, x)[1]
    close(stock, fused, x)


def test_with_autograd_and_without():
    stock, fused = pair()
    x = images(2, 3, 45, 38)
    with choose.fusing_all():
        got, expected = fused(x), stock(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().sum(), m.conv.weight)[0] for y, m in ((got, fused), (expected, stock))),
        rtol=1e-3,
        atol=1e-3,
    )
