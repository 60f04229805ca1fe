"""Training steps whose passes over activations are the CUDA kernels, run on the CPU: neither Triton nor a reference."""

from __future__ import annotations

import collections
import contextlib
import copy

import cuda_ops
import on_cpu
import pytest
import torch
from nets import BasicBlock, Bottleneck, observe
from torch import nn

import resnet_fused
from resnet_fused.backends import Backend, Kernel, backends, cuda, cuda_conv, dispatch, place, soundness
from resnet_fused.models.resnet import ResNet
from resnet_fused.ops import DATA_DTYPES
from resnet_fused.plan import choose
from resnet_fused.plan.variants import Variant

pytestmark = on_cpu.needed


def emulated(monkeypatch, kernels):
    """How often each op ran on the backend "emulated", as if on a GPU."""
    counts = collections.Counter()
    backend = Backend("emulated", ("cpu",), cuda_ops.counted(kernels, counts))
    monkeypatch.setattr(dispatch, "_backends", {"emulated": backend, **backends()})
    monkeypatch.setattr(choose, "on_gpu", lambda x: True)  # no step is the CPU's
    monkeypatch.setattr(place.planned, "elsewhere", True)
    soundness.forget()
    yield counts
    soundness.forget()


@pytest.fixture
def ran(monkeypatch, request):
    """The kernels of csrc/cuda; of the products, which round float32 to TF32, those that a test asks for."""
    products = {*cuda.CONVOLUTIONS, *cuda.PRODUCTS} - set(getattr(request, "param", ()))
    kernels = {name: kernel for name, kernel in cuda_ops.kernels().items() if name not in products}
    yield from emulated(monkeypatch, kernels)


@pytest.fixture
def ran_with_joins(monkeypatch):
    """And joins as one convolution."""
    monkeypatch.setattr(cuda_conv, "_op", lambda name: getattr(cuda_ops.registered(), name).default)
    joins = {name: Kernel(getattr(cuda_conv, name), DATA_DTYPES) for name in ("conv_add_relu", "conv_add_relu_")}
    kernels = {name: kernel for name, kernel in cuda_ops.kernels().items() if name != "conv_values"}
    yield from emulated(monkeypatch, kernels | joins)


def network(kind):
    """With a stem, blocks of each kind of shortcut, and parameters as after some training."""
    torch.manual_seed(0)
    model = ResNet(kind, [2, 1, 1, 1], num_classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.to(memory_format=torch.channels_last)


def check(got, want, near, dtype):
    assert got.keys() == want.keys()
    for name, value in want.items():
        ours, theirs = ((found[name].double() - value).norm() for found in (got, near))
        assert ours <= 2 * theirs + torch.finfo(dtype).eps * value.double().norm(), name


def compare(stock, size, dtype, plans=None):
    """A step of a fused copy of `stock`, and one of it, with a step in float64."""
    exact, fused = copy.deepcopy(stock).double(), resnet_fused.fuse(copy.deepcopy(stock))
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with resnet_fused.use("emulated"), plans or contextlib.nullcontext():
        got = observe(fused, x)
    check(got, observe(exact, x.double()), observe(stock, x), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_a_step_is_as_exact_as_stock(ran, kind, dtype):
    """Output, gradients and running statistics at twice stock's own error, each by name; within an ulp or so."""
    stock = network(kind).to(dtype)
    compare(stock, 64, dtype)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in stock.modules())
    assert ran["bn_stats"] == norms
    once = {"norm_relu_pool", "norm_relu_pool_backward", "norm_relu_pool_apply"}
    assert {name: ran[name] for name in once} == dict.fromkeys(once, 1)
    assert {"norm_add_relu", "norm_add_relu_backward", "norm_relu_coefficients", "bn_coefficients"} <= ran.keys()
    assert ran["lazy_grad_apply"] == norms - 1  # the stem behind its pool


def test_a_step_with_gram_joins_is_as_exact_as_stock(ran_with_joins):
    """Bottlenecks whose widest convolutions, projections too, are never written."""
    dtype, ran = torch.bfloat16, ran_with_joins
    stock = network(Bottleneck)
    stock.layer3 = stock.layer4 = nn.Identity()  # of wide weights the small matrices take long on a CPU
    stock.fc = nn.Linear(512, 4)
    stock = stock.to(dtype)
    compare(stock, 64, dtype, choose.tuning(lambda call: Variant(gram=True, gram_shortcut=True)))
    branches = 3 + 2  # of the blocks, and projections
    assert [ran[op] for op in ("gram", "gram_norm", "gram_grad")] == [branches] * 3
    assert ran["conv_add_relu"] + ran["conv_add_relu_"] >= branches


@pytest.mark.parametrize("ran", [["conv_values"]], indirect=True)
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_a_step_with_convolutions_on_values_is_as_exact_as_stock(ran, kind):
    """No batch norm has a pass of its own forward, and none is read for its statistics."""
    stock = network(kind)
    stock.layer3 = stock.layer4 = nn.Identity()
    stock.fc = nn.Linear(128 * kind.expansion, 4)
    stock = stock.to(torch.bfloat16)
    compare(stock, 48, torch.bfloat16)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in stock.modules())
    assert ran["conv_values"] == norms and not ran["bn_stats"] and not ran["bn_affine"]
    within = 3 * (1 if kind is BasicBlock else 2)  # blocks, which are written backward, for the weight's gradient
    assert ran["norm_add_relu"] == 3 + within
