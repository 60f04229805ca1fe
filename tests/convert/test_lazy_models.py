"""Whole models planned as for a GPU, run by the reference backend on the CPU, against stock."""

import copy

import pytest
import torch
from nets import assert_near, assert_same, block, images, observe, pair, small_resnet

import resnet_fused
from resnet_fused.convert import stock_forward
from resnet_fused.plan import choose
from resnet_fused.plan.devices import DEVICES


def lazily(model, x):
    """One observed step with the plan of an H100."""
    with choose.observing() as notes, choose.planning_for(DEVICES["h100"]), resnet_fused.use("reference"):
        return observe(model, x), notes


@pytest.mark.parametrize("options", [{}, {"groups": 4, "width_per_group": 32}], ids=["resnet", "resnext"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_bottleneck_network(options, frozen):
    model = resnet_fused.fuse(small_resnet(**options))
    if frozen:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    x = images(3, 3, 64)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with stock_forward():
        want = observe(model, x)
    model.load_state_dict(buffers, strict=False)
    got, notes = lazily(model, x)
    assert_near(got, want)
    assert any("on values" in note for note in notes) and any("Gram join" in note for note in notes)


def test_basic_blocks_are_not_lazy():
    _, notes = lazily(resnet_fused.fuse(resnet_fused.models.resnet18(num_classes=4)), images(2, 3, 64))
    assert notes and all("not 1x1" in note or "(a stem)" in note for note in notes)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    stock, fused = pair(block(16, 8, 2))
    x = images(channels=16)
    want = observe(stock, x)
    with choose.planning_for(DEVICES["h100"]), resnet_fused.use("reference"):
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        got = observe(fused, x, compiled)
    assert_same(got, want)


def test_autocast():
    """Parameters stay float32, the chain runs in 16-bit, and gradients arrive in float32."""
    stock, fused = pair(block(32, 8))
    x = images(channels=32)
    exact = observe(copy.deepcopy(stock), x)

    def under(model, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(h).float()

    theirs = observe(stock, x, lambda h: under(stock, h))
    with choose.planning_for(DEVICES["h100"]), resnet_fused.use("reference"):
        ours = observe(fused, x, lambda h: under(fused, h))
    for name, expected in exact.items():
        if expected.is_floating_point():
            stocks, error = ((seen[name] - expected).norm() / expected.norm() for seen in (theirs, ours))
            assert ours[name].dtype == expected.dtype and error <= 2 * stocks + 1e-3, name
