"""Residual blocks in bfloat16 on the CPU's values: as exact as stock, in every result, with and without autocast."""

import contextlib
import copy

import pytest
import torch

import resnet_fused
from resnet_fused.library import multiplies_bf16
from resnet_fused.models import Bottleneck
from resnet_fused.plan import choose, cpu_values, variants

pytestmark = pytest.mark.skipif(not multiplies_bf16(), reason="needs a processor that multiplies bfloat16")


def trained(block, x, cotangent, autocast=False):
    """Output, gradients and running statistics after a step."""
    x = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        out = block(x)
    out.backward(cotangent.to(out.dtype))
    found = {"out": out, "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}
    return {name: t.detach() for name, t in (found | dict(block.named_buffers())).items() if t.is_floating_point()}


def far(a, exact):
    return ((a.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def bottleneck(inputs, inner, stride):
    outer, projected = 4 * inner, None
    if stride > 1 or inputs != outer:
        norm = torch.nn.BatchNorm2d(outer)
        projected = torch.nn.Sequential(torch.nn.Conv2d(inputs, outer, 1, stride, bias=False), norm)
    return Bottleneck(inputs, inner, stride, projected).to(memory_format=torch.channels_last).train()


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("inputs", "inner", "stride", "shape"),
    [(128, 32, 1, (4, 12, 12)), (64, 32, 2, (3, 31, 29)), (256, 64, 2, (4, 14, 14)), (64, 64, 1, (2, 16, 15))],
    ids=str,
)
def test_a_bottleneck_is_as_exact_as_stock(monkeypatch, inputs, inner, stride, shape, autocast):
    monkeypatch.setattr(cpu_values, "MULTIPLIES_BF16", True)
    monkeypatch.setattr(variants, "_saves_by_gram", lambda *_: False)  # these few pixels have Gram joins on tensors
    torch.manual_seed(0)
    n, *size = shape
    stock = bottleneck(inputs, inner, stride)
    x = torch.randn(n, inputs, *size).contiguous(memory_format=torch.channels_last)
    if not autocast:
        stock, x = stock.bfloat16(), x.bfloat16()
    exact, fused = copy.deepcopy(stock).double(), resnet_fused.fuse(copy.deepcopy(stock))
    cotangent = torch.randn(exact(x.double()).shape).bfloat16().contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(stock).double()
    want, theirs = trained(exact, x.double(), cotangent.double()), trained(stock, x, cotangent, autocast)
    with choose.fusing_all(), choose.observing() as said:
        ours = trained(fused, x, cotangent, autocast)
    assert said[0].startswith("1x1 on values; ") and "join on values" in said[0]
    bad = {
        name: (far(t, want[name]), far(theirs[name], want[name]))
        for name, t in ours.items()
        if far(t, want[name]) > 2 * far(theirs[name], want[name]) + 1e-5
    }
    assert not bad
