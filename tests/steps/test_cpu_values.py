"""Residual blocks on values on the CPU, forced and as planned: as exact as stock, in every result, in float32."""

import contextlib
import copy

import pytest
import torch

import resnet_fused
from resnet_fused.library import status
from resnet_fused.models import Bottleneck
from resnet_fused.plan import choose, cpu_values
from resnet_fused.plan.variants import Variant

pytestmark = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")
FORCED = [Variant(True), Variant(True, keep=True), Variant(True, True), Variant(True, True, True)]


def trained(block, x, cotangent):
    """Output, gradients and running statistics after a step."""
    x = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    out = block(x)
    out.backward(cotangent)
    found = {"out": out, "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}
    return {name: t.detach() for name, t in (found | dict(block.named_buffers())).items() if t.is_floating_point()}


def far(a, exact):
    return ((a.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@contextlib.contextmanager
def forced(variant):
    with contextlib.nullcontext() if variant is None else choose.tuning(lambda call: variant):
        yield


@pytest.mark.parametrize("variant", [None, *FORCED], ids=str)
@pytest.mark.parametrize(
    ("inputs", "inner", "stride", "shape"),
    [(64, 16, 1, (4, 12, 12)), (48, 16, 2, (3, 15, 13)), (65, 3, 2, (3, 9, 8)), (5, 33, 1, (2, 8, 7))],
    ids=str,
)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_bottleneck_is_as_exact_as_stock(inputs, inner, stride, shape, mean, variant):
    torch.manual_seed(0)
    n, *size = shape
    projected = None
    if stride > 1 or inputs != 4 * inner:
        outer = 4 * inner
        projected = torch.nn.Sequential(
            torch.nn.Conv2d(inputs, outer, 1, stride, bias=False), torch.nn.BatchNorm2d(outer)
        )
    stock = Bottleneck(inputs, inner, stride, projected).to(memory_format=torch.channels_last).train()
    x = (torch.randn(n, inputs, *size) + mean).contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(stock).double()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    cotangent = torch.randn_like(stock(x).detach())
    stock = copy.deepcopy(exact).float()
    want, theirs = trained(exact, x.double(), cotangent.double()), trained(stock, x, cotangent)
    with forced(variant), choose.fusing_all(), choose.observing() as said:
        ours = trained(fused, x, cotangent)
    assert variant is None or "on values" in said[0]
    bad = {
        n: (far(t, want[n]), far(theirs[n], want[n]))
        for n, t in ours.items()
        if far(t, want[n]) > 2 * far(theirs[n], want[n]) + 5e-6
    }
    assert not bad


def test_planned_on_values_here(monkeypatch):
    """With the kernels' level as it would be on a CPU with AVX-512; the step in `explain`'s words."""
    monkeypatch.setattr(cpu_values, "level", lambda: "avx512")
    block = resnet_fused.fuse(Bottleneck(64, 16).to(memory_format=torch.channels_last).train())
    with choose.fusing_all(), choose.observing() as said:
        block(torch.randn(4, 64, 12, 12).contiguous(memory_format=torch.channels_last))
    assert said[0].startswith("1x1 on values; ") and "join on values" in said[0]
