"""A backend asked for by name trains and evaluates a whole model on the CPU, in whatever layout and dtype it is."""

import copy

import pytest
import torch
from nets import BasicBlock, Bottleneck, observe
from torch import nn

import resnet_fused
from resnet_fused.library import status
from resnet_fused.models.resnet import ResNet

needs_library = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")
named = pytest.mark.parametrize("name", [pytest.param("cpu", marks=needs_library), "reference"])
LAYOUTS = [torch.contiguous_format, torch.channels_last]
#: Relative errors: of float64 to prove the semantics, of 16 bits to see that it is the same network.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def network(kind, dtype, layout):
    torch.manual_seed(0)
    return ResNet(kind, [1, 1, 1, 1], num_classes=4).to(dtype, memory_format=layout)


def images(dtype, size=40):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_near(got, want, bound, names):
    for name in names:
        a, b = got[name].double(), want[name].double()
        assert (a - b).norm() <= bound * b.norm() + 1e-12, name


@named
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_trains_and_evaluates(kind, layout, dtype, name):
    stock = network(kind, dtype, layout)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), images(dtype)
    want = observe(stock, x)
    with resnet_fused.use(name):
        got = observe(fused, x)
    exact = dtype == torch.float64  # elsewhere a ReLU that rounds to the other side moves every gradient before it
    assert got.keys() == want.keys() and all(torch.isfinite(t.float()).all() for t in got.values())
    assert_near(got, want, BOUNDS[dtype], want if exact else ["out"])
    with torch.no_grad(), resnet_fused.use(name):
        assert_near({"out": fused.eval()(x)}, {"out": stock.eval()(x)}, BOUNDS[dtype], ["out"])


def freeze(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


@named
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_with_frozen_norms(layout, name):
    stock = network(Bottleneck, torch.float64, layout)
    freeze(stock)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock), backend=name), images(torch.float64)
    assert_near(observe(fused, x), want := observe(stock, x), 1e-10, want)


@named
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_under_autocast_and_on_an_empty_batch(layout, name):
    stock = network(Bottleneck, torch.float32, layout)
    fused = resnet_fused.fuse(copy.deepcopy(stock), backend=name)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (observe(model, images(torch.float32)) for model in (stock, fused))
    assert_near(got, want, 0.1, ["out"])
    empty = images(torch.float32)[:0]
    assert fused.layer1(torch.randn(0, 64, 8, 8)).shape == stock.layer1(torch.randn(0, 64, 8, 8)).shape
    assert fused(empty).shape == stock(empty).shape


@named
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_hooks_that_give_saved_tensors_back_contiguous(kind, training, name):
    """As ``save_on_cpu(pin_memory=True)`` does, and whoever stores them elsewhere."""
    stock = network(kind, torch.float64, torch.channels_last).train(training)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), images(torch.float64)

    def run(model):
        def forward(h):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().contiguous().clone(), lambda t: t):
                return model(h)

        return observe(model, x, forward)

    with resnet_fused.use(name):
        got = run(fused)
    want = run(stock)
    assert_near(got, want, BOUNDS[torch.float64], want)
