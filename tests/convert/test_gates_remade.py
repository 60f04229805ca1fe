"""Gates that keep nothing of the size of what they read: in backward it is made again, with ``prefer="memory"``."""

import copy

import pytest
import torch
from gated import (
    GATES,
    Block,
    Excite,
    InPlaceOnMean,
    OwnConv1d,
    assert_near,
    assert_same,
    image,
    observe,
    runs_gate,
    scattered,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused.bench.memory import saved_bytes

AGAIN = "made again in backward"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Basic(Block):
    """Its last convolution is 3x3."""

    def __init__(self, c, gate, project=False):
        super().__init__(c, gate, project)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)


class Activated(Block):
    """The gate reads what an activation made, as in EfficientNet."""

    def __init__(self, c, gate, project=False):
        super().__init__(c, gate, project)
        self.bn2 = pytest.importorskip("timm.layers").BatchNormAct2d(c, act_layer=nn.SiLU)


KINDS = {"1x1": Block, "3x3": Basic, "activation": Activated}


def fused(block, **options):
    return resnet_fused.fuse(copy.deepcopy(block), prefer="memory", **options)


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES[:4])
def test_values_and_gradients_are_stocks(gate, kind, train):
    block = assert_same(scattered(KINDS[kind](8, gate, kind == "1x1")), image(3, 8, 5, 4), train, prefer="memory")
    assert AGAIN in runs_gate(block, image(3, 8, 5, 4))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("prefer", ["speed", "memory"])
def test_errors_are_at_most_twice_stocks(prefer, backend):
    exact, x = scattered(Block(32, Excite, True)), image(4, 32, 9, 9)
    stock = copy.deepcopy(exact).float()
    ours = resnet_fused.fuse(copy.deepcopy(stock), prefer=prefer, backend=backend)
    found, theirs, expected = observe(ours, x.float()), observe(stock, x.float()), observe(exact, x)
    for name, value in expected.items():
        if value.dtype.is_floating_point:
            errors = [(t[name].double() - value).norm() / (value.norm() + 1e-9) for t in (found, theirs)]
            assert errors[0] <= 2 * errors[1] + 1e-6, name


def test_what_is_saved():
    """Of an identity block: its input, two raw tensors, and the sum; else what the gate reads, too."""
    block, x = Block(64, Excite), image(4, 64, 16, 16).float()
    unit = x.numel() * 4
    found = {}
    for prefer in ("speed", "memory"):
        ours = resnet_fused.fuse(copy.deepcopy(block), prefer=prefer)
        found[prefer] = saved_bytes(lambda ours=ours: ours(x), [*ours.parameters(), *ours.buffers()]) / unit
    # the input, the raw tensor that a Gram join's convolution reads normalised, and the sum
    assert found["memory"] == pytest.approx(3, rel=0.05) and found["speed"] >= found["memory"] + 0.95


def test_frozen_parameters_and_norms():
    def freeze(block):
        block.bn2.eval(), block.se.requires_grad_(False)

    def all_but_gate(block):
        block.requires_grad_(False)
        block.se.requires_grad_(True)

    def all_but_norm(block):
        block.requires_grad_(False)
        block.bn2.requires_grad_(True)

    for edit in (freeze, all_but_gate, all_but_norm):
        assert_same(scattered(Block(8, Excite)), image(2, 8, 5, 5), edit=edit, prefer="memory")


@pytest.mark.parametrize("train", [True, False])
def test_gradcheck_of_first_and_second_order(train):
    block = fused(scattered(Block(3, OwnConv1d)).train(train))
    x = image(2, 3, 3, 2).requires_grad_()
    names = [name for name, _ in block.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in block.parameters()))
    assert AGAIN in runs_gate(block, x)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_a_penalty_on_gradients_and_batched_ones():
    stock = scattered(Block(4, Excite, True))
    x = image(2, 4, 4, 3)

    def penalised(block):
        given = x.clone().requires_grad_()
        out = block(given)
        gradient = torch.autograd.grad(out.sin().sum(), given, create_graph=True)[0]
        cotangents = torch.linspace(-1, 1, 2 * out.numel(), dtype=out.dtype).view(2, *out.shape)
        batched = torch.autograd.grad(out, given, cotangents, is_grads_batched=True, retain_graph=True)[0]
        (out.cos().sum() + gradient.square().sum()).backward()
        return {"x": given.grad, "batched": batched, **{name: p.grad for name, p in block.named_parameters()}}

    found = penalised(fused(stock))
    assert_near(found, penalised(stock))


@pytest.mark.parametrize("how", ["checkpoint", "reentrant checkpoint", "on the CPU", "repeated"])
def test_whoever_packs_what_is_saved(how):
    """And calls of a form that are repeated."""
    stock = scattered(Block(8, InPlaceOnMean, True))
    ours, x = fused(stock), image(2, 8, 5, 5)

    def called(block):
        if how == "repeated":
            for _ in range(8):
                block(x).sum().backward()
            block.zero_grad()
            return observe(block, x)
        if how == "on the CPU":
            with torch.autograd.graph.save_on_cpu():
                return observe(block, x)
        return observe(block, x, lambda x: checkpoint(block, x, use_reentrant=how != "checkpoint"))

    found = called(ours)
    assert_near(found, called(stock))


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.weight", "bn2.weight"])
def test_a_write_before_backward_raises_as_in_stock(name):
    stock = scattered(Block(8, Excite))
    for block in (stock, fused(stock)):
        out = block(image(2, 8, 5, 5))
        with torch.no_grad():
            block.get_parameter(name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("name", ["conv2.weight", "bn2.weight", "bn2.bias", "bn1.weight"])
def test_the_gate_is_of_what_was_read_whatever_is_written_past_all_counters(name):
    """As stock's, which keeps that; in float32, where the last convolution is folded into a Gram join."""
    stock, x, found = scattered(Block(16, Excite)).float(), image(4, 16, 9, 9).float(), []
    for block in (stock, fused(stock)):
        block.zero_grad()
        out = block(x)
        block.get_parameter(name).data.mul_(-1.7)
        out.square().sum().backward()
        found.append([p.grad for p in block.se.parameters()])
        block.get_parameter(name).data.div_(-1.7)
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_another_forward_before_backward_changes_nothing():
    stock, x = scattered(Block(8, Excite)), image(2, 8, 5, 5)

    def twice(block):
        given = x.clone().requires_grad_()
        first = block(given)
        block(given * 2)
        first.square().sum().backward()
        first = {"x": given.grad, **{name: p.grad for name, p in block.named_parameters()}}
        return {**first, **dict(block.named_buffers())}

    found = twice(fused(stock))
    assert_near(found, twice(stock))


@pytest.mark.parametrize("train", [True, False])
def test_autocast_is_as_exact_as_stock(train):
    exact, x = scattered(Block(16, Excite, True)).train(train), image(4, 16, 9, 9)
    stock = copy.deepcopy(exact).float()

    def cast(block):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return block(x).float()

        return observe(block, x.float(), call)

    ours = fused(stock)
    with torch.autocast("cpu", torch.bfloat16):
        assert AGAIN in runs_gate(copy.deepcopy(ours), x.float())
    expected, theirs, found = observe(exact, x), cast(stock), cast(ours)
    for name, value in expected.items():
        if value.dtype.is_floating_point:
            errors = [(t[name].double() - value).norm() / (value.norm() + 1e-9) for t in (found, theirs)]
            assert errors[0] <= 2 * errors[1] + 0.02, name
