"""Squeeze-excite and its kin: values, gradients, and what is no gate."""

import copy

import pytest
import torch
from gated import (
    GATES,
    Block,
    Excite,
    NoSum,
    OwnConv1d,
    assert_near,
    assert_same,
    image,
    observe,
    runs_gate,
    scattered,
    timms,
)
from torch import nn

import resnet_fused


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_values_and_gradients_are_stocks(gate, project, train):
    assert_same(scattered(Block(8, gate, project)), image(3, 8, 5, 4), train)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_evaluation_without_gradients(gate, project, dtype):
    """Where nobody wants a gradient, the product is written over what it is of, and over nothing else."""
    stock = nn.Sequential(*(scattered(Block(8, gate, project)) for _ in range(2))).eval().to(dtype)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), image(3, 8, 5, 4).to(dtype)
    given = x.clone()
    with torch.no_grad():
        assert "mean over pixels; opaque" in runs_gate(fused, x)
        expected = stock(x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(x, given)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 5, 7), (2, 65, 3, 3), (4, 16, 1, 1), (2, 8, 6, 1)], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_shapes_and_layouts(shape, channels_last):
    assert_same(scattered(Block(shape[1], Excite, True)), image(*shape, channels_last=channels_last))


@pytest.mark.parametrize("train", [True, False])
def test_a_gate_without_a_sum_is_written_once(train):
    assert_same(scattered(NoSum(8, Excite)), image(2, 8, 5, 5), train)


def test_frozen_norms_and_parameters():
    def freeze(block):
        block.bn2.eval(), block.se.requires_grad_(False)

    assert_same(scattered(Block(8, Excite)), image(2, 8, 5, 5), edit=freeze)
    assert_same(scattered(Block(8, Excite)), image(2, 8, 5, 5), edit=lambda b: b.conv1.requires_grad_(False))

    def all_but_gate(block):
        block.requires_grad_(False)
        block.se.requires_grad_(True)

    assert_same(scattered(Block(8, Excite)), image(2, 8, 5, 5), train=False, edit=all_but_gate)


def test_nan_passes_as_in_stock():
    x = image(2, 8, 5, 5)
    x[0, 3, 1, 1] = torch.nan
    assert_same(scattered(Block(8, Excite)), x, train=False)


def test_empty_batch():
    stock = scattered(Block(8, Excite)).eval()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    x = image(2, 8, 5, 5)[:0]
    torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize("train", [True, False])
def test_gradcheck_of_first_and_second_order(train):
    block = resnet_fused.fuse(scattered(Block(3, OwnConv1d)).train(train))
    x = image(2, 3, 3, 2).requires_grad_()
    names = [name for name, _ in block.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in block.parameters()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_a_penalty_on_gradients_beside_a_loss():
    """One backward goes through the gate's own backward, and through what it left to be differentiated."""
    stock = scattered(Block(4, Excite, True))
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), image(2, 4, 4, 3)

    def penalised(block):
        given = x.clone().requires_grad_()
        out = block(given)
        gradient = torch.autograd.grad(out.sin().sum(), given, create_graph=True)[0]
        (out.cos().sum() + gradient.square().sum()).backward()
        return {"x": given.grad, **{name: p.grad for name, p in block.named_parameters()}}

    found = penalised(fused)
    assert_near(found, penalised(stock))


def test_a_factor_of_another_shape_is_stocks_product():
    class OneForAll(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.inner = nn.Conv2d(c, 1, 1)

        def forward(self, x):
            return x * self.inner(x.mean((2, 3), keepdim=True))

    assert_same(scattered(Block(8, OneForAll)), image(2, 8, 5, 5))


class TwoGates(Block):
    """One gated value is added to another."""

    def __init__(self, c, gate):
        super().__init__(c, gate, True)
        self.se2 = gate(c)

    def forward(self, x):
        shortcut = self.se2(self.downsample(x))
        return self.relu(self.se(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))) + shortcut)


@pytest.mark.parametrize("train", [True, False])
def test_two_gates_in_one_sum(train):
    assert_same(scattered(TwoGates(8, Excite)), image(2, 8, 5, 5), train)


@pytest.mark.parametrize("project", [False, True])
def test_a_drop_path_between_draws_what_stock_draws(project):
    drop = pytest.importorskip("timm.layers.drop") if timms() else pytest.skip("timm is not installed")

    class Dropped(Block):
        def __init__(self, c, gate, project):
            super().__init__(c, gate, project)
            self.drop_path = drop.DropPath(0.5)

        def forward(self, x):
            shortcut = x
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.drop_path(self.se(self.bn2(self.conv2(x))))
            if self.downsample is not None:
                shortcut = self.downsample(shortcut)
            return self.relu(shortcut + x)

    fused = assert_same(scattered(Dropped(8, Excite, project)), image(6, 8, 5, 5))
    assert "se * drop_path + " in str(resnet_fused.report(fused))
    assert_same(scattered(Dropped(8, Excite, project)), image(6, 8, 5, 5), train=False)


@pytest.mark.parametrize("reader", ["max", "mean of one side", "in place", "method of its own"])
def test_what_is_no_gate_stays_a_call_with_a_reason(reader):
    class Max(nn.Module):
        def forward(self, x):
            return x * (x.mean((2, 3), keepdim=True) + x.amax((2, 3), keepdim=True))

    class Side(nn.Module):
        def forward(self, x):
            return x * x.mean((2,), keepdim=True)

    class InPlace(nn.Module):
        def forward(self, x):
            x *= x.mean((2, 3), keepdim=True)
            return x

    class Method(nn.Module):
        def forward(self, x):
            return x * self.scale(x)

        def scale(self, x):
            return x.mean((2, 3), keepdim=True)

    kind = {"max": Max, "mean of one side": Side, "in place": InPlace, "method of its own": Method}[reader]
    fused = assert_same(scattered(Block(8, lambda c: kind())), image(2, 8, 5, 5), gated=False)
    assert "se is called: its forward" in str(resnet_fused.report(fused))


@pytest.mark.parametrize("train", [True, False])
def test_autocast_is_as_exact_as_stock(train):
    exact, x = scattered(Block(16, Excite, True)).train(train), image(4, 16, 9, 9)
    stock = copy.deepcopy(exact).float()
    fused = resnet_fused.fuse(copy.deepcopy(stock))

    def cast(block):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return block(x).float()

        return observe(block, x.float(), call)

    expected, theirs = observe(exact, x), cast(stock)
    with torch.autocast("cpu", torch.bfloat16):
        assert "opaque" in runs_gate(copy.deepcopy(fused), x.float())
    found = cast(fused)
    for name, value in expected.items():
        if value.dtype.is_floating_point:
            ours, stocks = ((t[name].double() - value).norm() / (value.norm() + 1e-9) for t in (found, theirs))
            assert ours <= 2 * stocks + 0.02, name


@pytest.mark.parametrize(("gate", "prefer"), [(Excite, "memory"), (OwnConv1d, "speed")])
def test_compiles_to_one_graph(gate, prefer):
    stock = scattered(Block(8, gate, True)).float()
    fused, x = resnet_fused.fuse(copy.deepcopy(stock), prefer=prefer), image(2, 8, 5, 5).float()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_near(observe(fused, x, compiled), observe(stock, x), rtol=1e-4, atol=1e-4)


def test_explain_and_report_name_the_gate_and_what_is_opaque():
    block = resnet_fused.fuse(Block(64, Excite, True))
    report = str(resnet_fused.report(block))
    assert "se: mean, [fc], product" in report and "se + downsample_1 -> relu" in report
    for training in (True, False):
        text = str(resnet_fused.explain(block, (8, 64, 56, 56), training=training))
        assert "mean over pixels; opaque se.fc; " in text and "gate with sum, ReLU" in text


@pytest.mark.plans_small
def test_small_gates_are_stocks():
    block = resnet_fused.fuse(Block(8, Excite)).double()
    assert "se: stock (too small to gain)" in runs_gate(block, image(2, 8, 5, 5))
