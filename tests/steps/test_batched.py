"""Batched gradients: every variant of a chain gives what stock's operations give."""

import dataclasses

import pytest
import torch
from chains import Chain, call_of, chain_output, make_step, run_chain

from resnet_fused.blocks import FusedConvBNReLU, conv_bn_add_relu
from resnet_fused.plan.lower import steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Pool
from resnet_fused.steps.program_node import run_program
from resnet_fused.steps.stock import program_output

F64 = torch.double
VARIANTS = {
    "plain": {},
    "gram": {"gram": True},
    "both gram": {"gram": True, "gram_shortcut": True},
    "lazy": {"values": True, "gram": True, "backend": "reference"},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batched(run, *leaves):
    out = run()
    torch.manual_seed(1)
    cotangents = torch.randn(4, *out.shape, dtype=out.dtype)
    return torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True)


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("residual", ["projection", "tensor", "identity"])
def test_chains(variant, batch_stats, residual):
    (s1, t1), (s2, t2) = make_step(6, 4, batch_stats=batch_stats), make_step(4, 6, batch_stats=batch_stats)
    shortcut, t3 = make_step(6, 6, batch_stats=batch_stats)
    x = torch.randn(2, 6, 4, 5, dtype=F64, requires_grad=True)
    added = {"projection": None, "tensor": torch.randn_like(x).requires_grad_(), "identity": x}[residual]
    projected = residual == "projection"
    chain = Chain((s1, s2), shortcut if projected else None, **variant)
    tensors = [t1, t2, t3] if projected else [t1, t2]
    leaves = [x, *([added] if residual == "tensor" else []), t1.weight, t1.beta, t2.weight, t2.gamma]
    got = batched(lambda: run_chain(chain, x, tensors, added), *leaves)
    assert_close(got, batched(lambda: chain_output(chain, x, added, None, tensors), *leaves))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_pooled_chains_and_vmap():
    step, own = make_step(6, 4, 3)
    x = torch.randn(2, 6, 7, 8, dtype=F64, requires_grad=True)
    chain = Chain((step,), pool=Pool())
    leaves = (x, own.weight, own.gamma)
    out, expected = run_chain(chain, x, [own]), chain_output(chain, x, None, None, [own])
    cotangents = torch.randn(3, *out.shape, dtype=F64)

    def gradients(value):
        return torch.func.vmap(lambda v: torch.autograd.grad(value, leaves, v, retain_graph=True))(cotangents)

    got = gradients(out)
    assert [tuple(g.shape) for g in got] == [(3, *leaf.shape) for leaf in leaves]
    assert_close(got, gradients(expected))
    assert_close(batched(lambda: out, *leaves), batched(lambda: expected, *leaves))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [True, False])
def test_jacobian_and_hessian(training):
    layer = FusedConvBNReLU(2, 2).double().train(training)
    x, residual = torch.randn(2, 2, 2, 2, dtype=F64), torch.randn(2, 2, 2, 2, dtype=F64)

    def stock(h, r):
        return torch.relu(layer.bn(layer.conv(h)) + r)

    def cubes(run):
        return lambda *args: run(*args).pow(3).sum()

    functional = torch.autograd.functional
    for got, want in (
        (functional.jacobian(layer, (x, residual), vectorize=True), functional.jacobian(stock, (x, residual))),
        (
            functional.hessian(cubes(layer), (x, residual), vectorize=True)[0],
            functional.hessian(cubes(stock), (x, residual))[0],
        ),
    ):
        assert_close(got, want)


def test_functions():
    x = torch.randn(2, 3, 4, 4, dtype=F64, requires_grad=True)
    weight = torch.randn(3, 3, 3, 3, dtype=F64, requires_grad=True)

    def ours():
        return conv_bn_add_relu(x, weight, None, None, residual=x, padding=1, training=True)

    def stock():
        y = torch.nn.functional.batch_norm(torch.conv2d(x, weight, padding=1), None, None, training=True)
        return torch.relu(y + x)

    assert_close(batched(ours, x, weight), batched(stock, x, weight))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_of_one_image_in_the_layout_that_stock_has():
    """PyTorch's own are wrong where channels_last meets one channel, so that a contiguous input must stay so."""
    (s1, t1), (s2, t2), (s3, t3) = make_step(6, 1), make_step(1, 4), make_step(4, 6)
    shortcut, t4 = make_step(6, 6)
    x = torch.randn(1, 6, 4, 5, dtype=F64, requires_grad=True)
    call = call_of(Chain((s1, s2, s3), shortcut), x, [t1, t2, t3, t4])
    last = dataclasses.replace(call.program.nodes[-1], other_first=True)
    call = call._replace(program=dataclasses.replace(call.program, nodes=(*call.program.nodes[:-1], last)))
    leaves = [x, t1.weight, t2.weight, t2.gamma, t3.weight, t3.beta, t4.beta]
    got = batched(lambda: run_program(steps_of(call, Variant()), call), *leaves)
    assert_close(got, batched(lambda: program_output(call), *leaves))
