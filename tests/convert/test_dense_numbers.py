"""Dense blocks by the kernels: how exact they are, what is not finite, and what they leave to stock."""

import copy

import pytest
import torch
from dense_blocks import dense_block, fused, images, ran_fused, step
from torch import nn

from resnet_fused import library
from resnet_fused.models import densenet

needs_kernels = pytest.mark.skipif(not library.status().cpu.loaded, reason="kernels of the compiled library")


@needs_kernels
@pytest.mark.parametrize("prefer", ["speed", "memory"])
@pytest.mark.parametrize("training", [True, False])
def test_float32_by_kernels_is_as_exact_as_stock(maker, prefer, training):
    """At twice stock's own error, each by name."""
    exact = dense_block(maker).train(training)
    stock = copy.deepcopy(exact).float()
    block = fused(stock, backend="auto", prefer=prefer)
    wide = images(n=4, size=13)
    for _ in range(6):
        (got, was_fused), near, want = ran_fused(lambda: step(block, wide.float())), step(stock, wide.float()), None
        assert was_fused
    want = [step(exact, wide) for _ in range(6)][-1]
    for name, value in want.items():
        errors = [(found[name].double() - value).norm() for found in (got, near)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * value.double().norm(), name


@pytest.mark.plans_small
def test_few_values_per_channel_are_stock():
    stock = dense_block().float()
    block = fused(stock, backend="auto")
    assert not ran_fused(lambda: block(images(n=1, size=6, dtype=torch.float32)))[1]
    assert ran_fused(lambda: block(images(n=2, size=6, dtype=torch.float32)))[1] == library.status().cpu.loaded


def test_other_dtypes_are_stock():
    block = dense_block().bfloat16()
    x = images(dtype=torch.bfloat16)
    got, was_fused = ran_fused(lambda: fused(block, backend="auto")(x))
    assert not was_fused and torch.equal(got, block(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "backend"), [(torch.float64, "reference"), (torch.float32, "cpu")])
def test_what_is_not_finite_reaches_the_gradients_that_it_reaches_in_stock(value, training, dtype, backend):
    """Frozen norms have no term in what they read, and nobody in the block reads the last layer's channels."""
    if backend == "cpu" and not library.status().cpu.loaded:
        pytest.skip("the compiled library is not there")
    stock = dense_block("ours").train(training).to(dtype)
    block, x = fused(stock, backend=backend), images(dtype=dtype)
    x[0, 3, 4, 5] = value
    want, got = (reached(module, x) for module in (stock, block))
    for name, pattern in want.items():
        assert torch.equal(got[name], pattern), name


def reached(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where gradients are NaN."""
    x = x.clone().requires_grad_()
    module(x).sum().backward()
    return {"x": x.grad.isnan()} | {name: p.grad.isnan() for name, p in module.named_parameters()}


def test_layers_of_which_nothing_wants_a_gradient_are_not_run_again():
    stock = densenet.DenseBlock(3, 16, 2, 8, 0.0, memory_efficient=True)
    stock.denselayer1.requires_grad_(False)
    block = fused(stock)
    for module in (stock, block):
        module(torch.randn(4, 16, 16, 16)).sum().backward()
    counted = [[layer.norm1.num_batches_tracked.item() for layer in module.children()] for module in (stock, block)]
    assert counted[0] == counted[1] == [1, 1, 2]
