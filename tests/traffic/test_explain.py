"""The counted figures of `explain`, and that it runs nothing."""

import contextlib
import importlib
import re

import pytest
import torch
from nets import block, small_resnet
from torch import nn
from torch.utils._pytree import tree_map

import resnet_fused
from resnet_fused import cli
from resnet_fused.backends import cuda, onednn, soundness
from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck.cases import cases
from resnet_fused.backends.selfcheck.draws import place
from resnet_fused.models import resnet18, resnet50
from resnet_fused.ops import OPS
from resnet_fused.plan import choose, devices
from resnet_fused.plan.devices import DEVICES
from resnet_fused.traffic.calls import calls
from resnet_fused.traffic.count import Counter, own_operation


def test_counts_of_a_known_block():
    """An identity bottleneck, by hand, in units of one narrow activation: 16x16 pixels of 8 channels."""
    explained = resnet_fused.explain(block(32, 8), (2, 32, 16, 16))
    unit = 16 * 16 * 8 * 4 * 2
    entry = explained.model
    stock = 54 + 84  # forward: 2+3+2+2+3+2+5+12+12+8 and so on, one read or write of a narrow tensor each
    weights = sum(p.numel() for p in block(32, 8).parameters()) * 4
    assert entry.stock.bytes == pytest.approx(stock * unit, rel=0.15)
    assert entry.fused.bytes < 0.75 * entry.stock.bytes + 30 * weights
    assert entry.compiled.bytes == pytest.approx(112 * unit, rel=0.05)  # see test_compiled_traffic
    assert entry.stock_saved == pytest.approx((4 + 12) * unit, rel=0.01)  # x; z, and relu or out, of widths 1, 1, 4
    assert entry.fused_saved == pytest.approx((4 + 1 + 1 + 4) * unit, rel=0.03)  # x, z1, z2, out and vectors
    assert entry.stock.launches == (1 + 2 + 1) * 3 + 1 + 3 + (2 + 2 + 1) * 3 + 1  # the adds; three counters; both paths


def test_resnet50_saves_and_moves_less():
    explained = resnet_fused.explain(resnet50(), (16, 3, 224, 224))
    assert explained.model.fused_saved <= 0.60 * explained.model.stock_saved
    assert explained.model.fused.bytes <= 0.75 * explained.model.stock.bytes
    assert [b.name for b in explained.blocks][:2] == ["layer1.0", "layer1.1"]
    assert "Gram join" in explained.blocks[1].plan and "plain join" in explained.blocks[-1].plan
    text = str(explained)
    assert "whole model" in text and "not measured" in text
    assert f"Plan 1: {explained.blocks[0].plan}" in text
    assert explained.device is None and explained.predictions == ()
    assert "| ms" not in text


@pytest.mark.parametrize("name", DEVICES)
def test_resnet50_on_gpus(name):
    """What the design promises for a training step in 16-bit, and that every bottleneck is planned for it."""
    explained = resnet_fused.explain(resnet50(), (256, 3, 224, 224), dtype=torch.bfloat16, device=name)
    model, images = explained.model, 256
    assert model.fused.bytes <= 190e6 * images
    assert model.fused_saved <= 24e6 * images
    assert model.stock.bytes == pytest.approx(463e6 * images, rel=0.03)
    assert model.compiled.bytes == pytest.approx(352e6 * images, rel=0.03)
    assert all("on values" in b.plan for b in explained.blocks)
    (row,) = explained.predictions
    assert row.fused.low < row.compiled.low < row.stock.low
    assert max(b.fused.launches for b in explained.blocks) <= 50


WITH, WITHOUT = True, False  # the compiled convolution


@pytest.mark.parametrize(
    ("kind", "compiled", "share", "launches"),
    [
        (resnet50, WITH, 0.313, 52),
        (resnet50, WITHOUT, 0.31, 105),
        (resnet18, WITH, 0.389, 23),
        (resnet18, WITHOUT, 0.52, 59),
    ],
)
def test_evaluation_on_a_gpu(monkeypatch, kind, compiled, share, launches):
    """What the programs would run there: never a launch or byte more than stock in any block; no folded weights."""
    if not compiled:
        monkeypatch.setattr(cuda, "ASSUMED", frozenset())
    soundness.forget()
    options = {"dtype": torch.bfloat16, "training": False, "device": "h100"}
    explained = resnet_fused.explain(kind(), (256, 3, 224, 224), **options)
    model = explained.model
    soundness.forget()
    assert model.fused.bytes <= share * model.stock.bytes
    assert model.fused.bytes <= 62e6 * 256 and (model.fused.launches <= 70 or not compiled)
    assert model.fused.launches == launches
    for row in (*explained.blocks, model):
        assert row.fused.bytes <= row.stock.bytes and row.fused.launches <= row.stock.launches
    names = {operation.name for operation in model.fused.operations}
    assert "conv_add_relu" not in names and ("conv_norm_add_relu" in names) == compiled
    assert ("norm_relu_pool" in names) != compiled
    assert not names & {"aten::relu_", "aten::add_"} and not any("batch_norm" in name for name in names)
    assert all(row.plan.startswith("evaluation: ") for row in explained.blocks)
    (row,) = explained.predictions
    assert row.fused.low < row.compiled.low < row.stock.low


def test_the_image_has_no_gradient():
    """Of a model, the first convolution's data gradient is not counted; of a block, it is."""
    model = small_resnet()
    stem, first = model.conv1.weight.numel(), model.layer1[0].conv1.weight.numel()
    explained = resnet_fused.explain(model, (2, 3, 64, 64))
    flops = [o.flops for o in explained.model.stock.operations if o.name == "aten::convolution_backward"]
    assert flops[-1] == 2 * 2 * 32 * 32 * stem
    flops = [o.flops for o in explained.blocks[0].stock.operations if o.name == "aten::convolution_backward"]
    assert 2 * 2 * 2 * 16 * 16 * first in flops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_run_or_touched(dtype):
    model = small_resnet()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    text = str(resnet_fused.explain(model, (2, 3, 64, 64), dtype=dtype, training=False))
    if dtype == torch.float32:
        assert re.search("evaluation: .*convolution.* with norm, ReLU; ", text)
    else:  # which oneDNN does not convolve on every CPU
        assert ("evaluation: convolution with norm, ReLU; " in text) == (dtype in onednn.SERVED)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not resnet_fused.report(model).fused


def test_a_device_plans_and_predicts(monkeypatch):
    asked = []
    planning_for = choose.planning_for

    @contextlib.contextmanager
    def noting(device):
        asked.append(device)
        with planning_for(device):
            yield

    monkeypatch.setattr(choose, "planning_for", noting)
    explained = resnet_fused.explain(small_resnet(), (64, 3, 64, 64), dtype=torch.bfloat16, device="H100")
    h100 = DEVICES["h100"]
    assert explained.device is h100 and set(asked) == {h100}
    (only,) = explained.predictions
    assert only.device is h100
    for side in ("fused", "stock", "compiled"):
        expected, counted = getattr(only, side), getattr(explained.model, side)
        assert expected == devices.expect(counted.operations, h100, side)
        moving = counted.bytes / (devices.BANDWIDTH_SHARE * h100.bandwidth)
        assert expected.low >= moving + counted.launches * h100.overhead
        assert expected.high >= expected.host == counted.launches * devices.HOST_SECONDS[side] > 0
    assert only.compiled.low < only.stock.low
    lines = str(explained).splitlines()
    assert lines[0].split("|")[-4].strip() == "ms"
    cells = [cell.strip() for cell in lines[len(explained.blocks) + 2].split("|")[-4:-1]]
    sides = (only.fused, only.stock, only.compiled)
    assert cells == [f"{side.low * 1e3:.2f}-{side.high * 1e3:.2f}" for side in sides]
    how = next(line for line in lines if line.startswith("ms: from a roofline to 0.45 of it"))
    assert f"an assumed {only.fused.host * 1e3:.0f} ms fused, {only.stock.host * 1e3:.0f} ms stock" in how


@pytest.mark.parametrize(("inputs", "size"), [(256, 56), (512, 28), (1024, 14), (2048, 7)])
def test_an_identity_bottleneck_takes_24_launches_in_every_layer(inputs, size):
    """Forward and backward, also where both gradients of its convolutions are two passes each."""
    model = nn.Sequential(block(inputs, inputs // 4))
    explained = resnet_fused.explain(model, (256, inputs, size, size), dtype=torch.bfloat16, device="h100")
    (only,) = explained.blocks
    assert only.fused.launches <= 24 < only.stock.launches
    assert explained.model.fused.launches <= 24  # which wants no gradient of the input


def test_the_step_of_resnet50_is_predicted_as_its_machine_code_was_read(monkeypatch):
    """The review's 36 to 48 ms lie within the range but for what was saved since, and the host's time is not forgotten.

    It read 464 launches; those that were saved since took 2 us each, and 62 us of the host, which takes less for each.
    The 3x3 convolutions were cuDNN's.
    """
    monkeypatch.setattr(cuda, "ASSUMED", frozenset())
    soundness.forget()
    explained = resnet_fused.explain(resnet50(), (256, 3, 224, 224), dtype=torch.bfloat16, device="h100")
    soundness.forget()
    (row,) = explained.predictions
    saved = 464 - explained.model.fused.launches
    assert saved > 0
    assert row.fused.low < 36e-3 and row.fused.high + saved * 2e-6 / devices.SURE_SHARE >= 47.9e-3
    assert 16e-3 < row.fused.host <= row.fused.high and row.stock.host > 0.02
    assert row.fused.host == pytest.approx((464 - saved) * devices.HOST_SECONDS["fused"])


def test_without_a_device_16_bit_is_predicted_on_all():
    explained = resnet_fused.explain(small_resnet(), (64, 3, 64, 64), dtype=torch.float16)
    assert [p.device for p in explained.predictions] == list(DEVICES.values())
    a100, h100, h200 = explained.predictions[:3]
    assert a100.stock.low > h100.stock.low > h200.stock.low
    text = str(explained)
    assert all(f"| {known.name} " in text for known in DEVICES.values())


def test_the_table_is_readable():
    explained = resnet_fused.explain(resnet50(), (256, 3, 224, 224), dtype=torch.bfloat16, device="b200")
    table = [line for line in str(explained).splitlines() if line.startswith("|")]
    rows = table[: len(explained.blocks) + 3]
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) <= 180


def test_the_command_line_takes_a_device(capsys):
    assert cli.main(["explain", "resnet18", "--input", "2,3,64,64", "--dtype", "bf16", "--device", "a100"]) == 0
    assert " ms |" in capsys.readouterr().out.splitlines()[0]
    assert cli.main(["explain", "resnet18", "--device", "v100"]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in DEVICES)


def test_bad_input_size():
    with pytest.raises(ValueError, match=r"input_size is \(3, 224, 224\); pass \(N, C, H, W\)"):
        resnet_fused.explain(small_resnet(), (3, 224, 224))


def test_bad_device():
    with pytest.raises(ValueError, match="unknown device 'tpu'; pass one of 'a100', 'h100'"):
        resnet_fused.explain(small_resnet(), (2, 3, 64, 64), device="tpu")


def test_operations_by_hand():
    x = torch.ones(4, 8, 6, 6)
    with Counter() as counter:
        y = x + 1
        y.view(-1).relu_()
        y.copy_(x)
        x[:, :1].expand(4, 8, 6, 6).sum()
    size = x.numel() * 4
    counted = [(o.name, o.bytes) for o in counter.total.operations]
    assert counted == [
        ("aten::add", 2 * size),
        ("aten::relu_", 2 * size),
        ("aten::copy_", 2 * size),
        ("aten::sum", size // 8 + 4),
    ]
    assert counter.total.bytes == sum(moved for _, moved in counted)
    assert counter.total.launches == 4


#: What a layer's pixels are split for and summed by a second launch, a small case's are not.
SPLIT = {"conv1x1_wgrad", "conv1x1_backward"}


def on_meta(argument):
    return argument.to("meta") if isinstance(argument, torch.Tensor) else argument


@pytest.mark.parametrize("name", room.OPS)
def test_launches_are_those_of_the_triton_kernels(name, monkeypatch):
    """Counted on meta tensors, where kernels would start."""
    pytest.importorskip("triton", reason="Triton is not installed")
    common = importlib.import_module("resnet_fused.backends.triton.common")
    kernel = importlib.import_module(f"resnet_fused.backends.triton.{name}")
    started = []
    monkeypatch.setattr(common, "start", lambda kernel, *args, **meta: started.append(kernel))
    overload = getattr(torch.ops.resnet_fused_auto, name).default
    for case in cases(name, torch.bfloat16):
        placed = place(case, torch.bfloat16, torch.device("cpu"))
        args, kwargs = tree_map(on_meta, (placed.args, placed.kwargs))
        if kernel.KERNEL.unsupported(*args, **kwargs):
            continue
        started.clear()
        kernel.run(*args, **kwargs)
        counted = own_operation(overload, args, kwargs, OPS[name].fake(*args, **kwargs))
        assert counted.launches - len(started) in ((0, 1) if name in SPLIT else (0,)), case.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_for_a_gpu_has_no_op_of_the_cpu_alone(dtype):
    x = torch.empty(8, 3, 64, 64, device="meta")
    ops = {call.op for call in calls(resnet18(), x, True, devices.find("h100"), dtype)}
    assert "norm_add_relu" in ops
    assert not {op for op in ops if op.startswith(("winograd", "stem", "conv_weight_grad"))}


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_multiply_within_themselves_in_both_gradients(transposed):
    """PyTorch's own counter takes the weight's gradient for one without groups."""
    x, weight = torch.empty(2, 32, 8, 6), torch.empty(32, 4, 3, 3)
    settings = (None, [2, 2], [1, 1], [1, 1], transposed, [0, 0], 8)
    grad = torch.empty(2, 32, *((15, 11) if transposed else (4, 3)))
    small = grad if not transposed else x
    for mask in ([True, False, False], [False, True, False], [True, True, False]):
        with Counter() as counted:
            torch.ops.aten.convolution_backward(grad, x, weight, *settings, mask)
        assert counted.total.flops == sum(mask) * 2 * small[:, 0].numel() * weight.numel()
