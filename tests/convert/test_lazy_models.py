"""Whole models planned as for a GPU, run by the reference backend on the CPU, against stock."""

import pytest
import torch
from nets import assert_near, images, observe, small_resnet

import resnet_fused
from resnet_fused.blocks import plan
from resnet_fused.blocks.devices import DEVICES
from resnet_fused.convert import stock_forward


def lazily(model, x):
    """One observed step with the plan of an H100."""
    notes = []
    plan.observers.append(notes.append)
    try:
        with plan.planning_for(DEVICES["h100"]), resnet_fused.use("reference"):
            seen = observe(model, x)
    finally:
        plan.observers.pop()
    return seen, notes


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
    assert any(note.startswith("lazy") for note in notes) and any("Gram join" in note for note in notes)


def test_basic_blocks_are_not_lazy():
    _, notes = lazily(resnet_fused.fuse(resnet_fused.models.resnet18(num_classes=4)), images(2, 3, 64))
    assert notes and all("not 1x1" in note for note in notes)
