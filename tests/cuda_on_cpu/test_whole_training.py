"""Whole models in training under ``use("cuda")``, its kernels run on the CPU: planned as `explain` counts, every
convolution forward by a compiled kernel, and twice stock's error against float64.

Outputs and running statistics are those of the whole model. Gradients are compared block by block, on the block's own
input: through fifty layers with random weights rounding flips so many ReLUs that in bfloat16 the gradients of both
sides err by about as much as they are.
"""

from __future__ import annotations

import collections
import copy

import cuda_ops
import on_cpu
import pytest
import torch
from guarded import tf32
from nets import BasicBlock, Bottleneck, block, observe, thin
from torch import nn

import resnet_fused
from resnet_fused.bench import equality
from resnet_fused.bench.blocks import distinct_blocks
from resnet_fused.models import resnet18, resnet50, wide_resnet50_2
from resnet_fused.plan import choose

pytestmark = on_cpu.needed
aten = torch.ops.aten
MODELS = [resnet18, resnet50, wide_resnet50_2]
STOCK = ("aten::convolution", "aten::batch_norm", "aten::native_batch_norm_backward", "aten::relu", "aten::max_pool2d")
STEM = "convolution on values; norm on load; norm, ReLU and pool in one pass"


@pytest.fixture
def ran():
    """How often each op of the emulated backend "cuda" ran."""
    counts = collections.Counter()
    with cuda_ops.training(counts), resnet_fused.use("cuda"):
        yield counts


class RoundedConvolution(torch.autograd.Function):
    """A convolution of float32 and its gradients as stock has them on tensor cores: of operands rounded to TF32."""

    @staticmethod
    def forward(ctx, x, weight, *where):
        ctx.save_for_backward(x, weight)
        ctx.where = where
        return aten.convolution(tf32(x), tf32(weight), None, *where, False, [0, 0], 1)

    @staticmethod
    def backward(ctx, grad):
        operands = [tf32(t) for t in (grad, *ctx.saved_tensors)]
        wanted = [*ctx.needs_input_grad[:2], False]
        found = aten.convolution_backward(*operands, None, *ctx.where, False, [0, 0], 1, wanted)
        return *found[:2], None, None, None


class RoundedConv2d(nn.Conv2d):
    def forward(self, x):
        if x.dtype == torch.float64:
            return super().forward(x)
        return RoundedConvolution.apply(x, self.weight, self.stride, self.padding, self.dilation)


def images(dtype):
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def blocks_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BasicBlock | Bottleneck)}


def plans(lines):
    """What was chosen, without why."""
    return [line.partition(" (")[0] for line in lines]


def check(got, want, near):
    """At twice stock's error, by name; within an ulp or so."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        ours, theirs = ((found[name].double() - value).norm() for found in (got, near))
        assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps * value.double().norm(), name


def continuous(seen):
    """What a flipped ReLU changes no more than rounding does: output and running statistics."""
    return {name: t for name, t in seen.items() if name == "out" or "running" in name}


@pytest.mark.parametrize("make", MODELS)
def test_a_step_runs_as_it_is_counted(ran, make):
    """By compiled kernels but for what 3x3 gradients and running statistics take, and the last layer."""
    stock = thin(make(num_classes=4), 8)
    exact, fused, x = copy.deepcopy(stock).double(), resnet_fused.fuse(copy.deepcopy(stock)), images(torch.bfloat16)
    with choose.observing() as said, torch.profiler.profile() as profiled:
        got = observe(fused, x)
    check(continuous(got), continuous(observe(exact, x.double())), observe(stock, x))
    counted = resnet_fused.explain(copy.deepcopy(stock), x.shape, dtype=torch.bfloat16, device="h100")
    assert plans(said) == [STEM, *plans(block.plan for block in counted.blocks)]
    called = collections.Counter(event.name for event in profiled.events())
    assert called.keys().isdisjoint(STOCK)
    convolutions = [module for module in stock.modules() if isinstance(module, nn.Conv2d)]
    bottlenecks = any(isinstance(module, Bottleneck) for module in stock.modules())
    ones = [conv for conv in convolutions if conv.kernel_size == (1, 1)]
    on_values = ones if bottlenecks else []  # the 1x1 ops', with their gradients
    assert ran["conv1x1"] + ran["gram"] == ran["conv1x1_dgrad"] == len(on_values)
    assert ran["conv_values"] == len(convolutions) - len(on_values)
    strided = 0 if bottlenecks else len(ones)  # whose two gradients are two calls
    assert called["aten::convolution_backward"] == ran["conv_values"] + strided


@pytest.mark.parametrize("make", MODELS)
def test_each_gradient_of_each_kind_of_block(ran, monkeypatch, make):
    """And output, input's gradient and buffers; medians of three inputs, as `bench` compares any model."""
    monkeypatch.setattr(equality, "BLOCK_TRIALS", 3)
    stock = thin(make(num_classes=4), 8)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    kinds = distinct_blocks(stock, blocks_of(stock), images(torch.bfloat16))
    assert len(kinds) == (7 if make is resnet18 else 8)
    for kind in kinds:
        found = equality.check_block(stock.get_submodule(kind.name), fused.get_submodule(kind.name), kind, None)
        assert not [str(difference) for difference in found if not difference.agrees]


def test_the_gradients_of_what_is_around_blocks(ran):
    """Of the stem and the last layer, with no block between them."""
    stock = thin(resnet18(num_classes=4), 8)
    stock.layer1 = stock.layer2 = stock.layer3 = stock.layer4 = nn.Identity()
    stock.fc = nn.Linear(8, 4).bfloat16()
    exact, fused, x = copy.deepcopy(stock).double(), resnet_fused.fuse(copy.deepcopy(stock)), images(torch.bfloat16)
    check(observe(fused, x), observe(exact, x.double()), observe(stock, x))
    assert ran["conv_values"] == ran["norm_relu_pool"] == ran["norm_relu_pool_backward"] == 1


def test_float32_is_as_exact_as_stock_where_both_round_to_tf32(ran):
    """Medians of three inputs, of blocks of both kinds."""
    stock = nn.Sequential(block(16, 8), block(32, 8, 2), block(32, 32, kind=BasicBlock), block(32, 48, 2, BasicBlock))
    stock = stock.to(memory_format=torch.channels_last)
    rounded = copy.deepcopy(stock)
    for conv in rounded.modules():
        if isinstance(conv, nn.Conv2d):
            conv.__class__ = RoundedConv2d
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(4, 16, 12, 12, generator=draw).to(memory_format=torch.channels_last) for _ in range(3)]
    found = equality.compare([(rounded, fused, x) for x in inputs], None, 0.0)
    assert not [str(difference) for difference in found if not difference.agrees]
    assert {"conv_values", "conv1x1", "conv1x1_dgrad"} <= ran.keys()
