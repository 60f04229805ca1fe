"""What each part of a GPU's report measures and finds wrong, on the CPU and small shapes."""

import collections
import dataclasses
import pathlib

import pytest
import torch
from injected_parts import TINY, Half, context_of, rows_of

from resnet_fused.backends import backends
from resnet_fused.backends.declaration import Kernel
from resnet_fused.bench import equality, named
from resnet_fused.bench.gpu_report import bandwidth, calls, child, cudnn, selfcheck
from resnet_fused.bench.gpu_report.context import Context
from resnet_fused.bench.gpu_report.parts import BY_NAME, PARTS
from resnet_fused.bench.gpu_report.stream import Document, Stream
from resnet_fused.ops import OPS
from resnet_fused.plan import devices
from resnet_fused.traffic.calls import Call, Spec


@pytest.mark.parametrize("name", [part.name for part in PARTS])
def test_every_item_of_a_part_runs_or_says_why_not(tmp_path, name):
    # values: at 32 pixels layer4 would normalise two numbers a channel, whose gradients are rounding's in stock as well
    settings = dataclasses.replace(TINY, size=64) if name == "models" else TINY
    context = context_of(tmp_path, name, settings)
    child.work(context, BY_NAME[name].module, set())
    rows = rows_of(context)
    assert rows and not [row for row in rows if row["status"] in ("failed", "error")]
    assert all(row["reason"] for row in rows if row["status"] == "skipped")
    begun = [line["item"] for line in context.stream.read() if line["kind"] == "begin"]
    assert {row["item"] for row in rows} == set(begun)
    for row in rows:
        if row["status"] == "measured" and "ms" in row:
            assert 0 < row["q10"] <= row["ms"] <= row["q90"]
    if name == "bandwidth":
        check_rows_of_kernels(*rows)
    assert (name in ("warmup", "cuda_graph", "sweep", "compiled")) == all(row["status"] == "skipped" for row in rows)


def check_rows_of_kernels(copy, *rows):
    """They have bytes, bandwidth, prediction and error."""
    assert copy["name"] == "device copy"
    for row in rows:
        assert row["bytes"] > 0 and row["predicted_ms"] > 0 and row["match"]["agrees"] is True
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / copy["gb_per_s"])
    assert {row["by"] for row in rows} == {"resnet18, training", "resnet18, evaluation"}


def test_calls_of_a_model_are_those_that_it_makes():
    """As often as its batch norms and joins, with the shapes of its layers."""
    context = Context("bandwidth", TINY, Stream(pathlib.Path("unused")), 1)
    found = calls.calls_of(context, "resnet18", True)
    shapes = collections.Counter()
    for call, count in found.items():
        given = dict(call.arguments)
        if call.op == "bn_stats":
            shapes[given["z"].shape] += count
        elif call.op == "winograd_conv3x3" and given.get("statistics"):  # which keeps the sides
            n, _, *sides = given["x"].shape
            shapes[(n, given["weight"].shape[0], *sides)] += count
        elif call.op == "stem_conv" and given.get("statistics"):  # which halves them
            n, _, h, w = given["x"].shape
            shapes[(n, given["weight"].shape[0], h // 2, w // 2)] += count
    assert shapes == {(2, 64, 16, 16): 1, (2, 64, 8, 8): 4, (2, 128, 4, 4): 5, (2, 256, 2, 2): 5, (2, 512, 1, 1): 5}


@pytest.mark.parametrize("training", [True, False], ids=("training", "evaluation"))
def test_drawn_arguments_of_a_gpus_plan_leave_no_right_kernel_in_doubt(tmp_path, monkeypatch, training):
    """The reference in bfloat16 stands for a right kernel: a sign near zero, or a variance below it, would fail it."""
    monkeypatch.setattr(calls.devices, "of", lambda device: devices.find("h100"))
    context = context_of(tmp_path, "bandwidth", Half())
    # more than two values a channel in the last layer: of two that are nearly equal nobody can tell the deviation
    context.settings = dataclasses.replace(context.settings, size=96)
    found = calls.calls_of(context, "resnet50", training)
    assert {"conv1x1_join", "conv1x1_backward", "gram_norm"} <= {call.op for call in found} or not training
    for call in found:
        arguments = calls.drawn(call, torch.Generator().manual_seed(0))
        matched = bandwidth.match(context, call, OPS[call.op].reference, arguments)
        assert matched["agrees"], f"{call.op} {call.label}: {matched}"


def broken(kernel, wrong):
    return Kernel(lambda *args, **kwargs: wrong(kernel.run(*args, **kwargs)), kernel.dtypes, kernel.unsupported)


def off_by_a_thousandth(results):
    out, mask = results
    return out * 1.001, mask


def one_wrong_bit(results):
    out, mask = results
    return out, mask.index_put((torch.tensor([0]), torch.tensor([0])), mask[0, 0] ^ 1)


@pytest.mark.parametrize("wrong", [off_by_a_thousandth, one_wrong_bit])
def test_a_wrong_kernel_fails(tmp_path, monkeypatch, wrong):
    cpu, shape = backends()["cpu"], (2, 64, 8, 8)
    monkeypatch.setitem(cpu.kernels, "norm_add_relu", broken(cpu.kernels["norm_add_relu"], wrong))
    data = Spec("z", shape, (4096, 1, 512, 64), torch.float32)
    vectors = [(name, Spec(name, (64,), (1,), torch.float32)) for name in ("scale", "shift")]
    none = [(name, None) for name in ("residual", "residual_scale", "residual_shift", "sample_factor")]
    call = Call("norm_add_relu", (("z", data), *vectors, *none, ("relu", True), ("emit_mask", True)))
    context = context_of(tmp_path, "bandwidth")
    bandwidth.row_of_call(context, cpu, call, 1, "a test", {})
    (row,) = rows_of(context)
    assert row["status"] == "failed" and row["match"]["agrees"] is False
    two = [(torch.float32, cpu, op) for op in ("gram", "norm_add_relu")]  # that all are right another test sees
    monkeypatch.setattr(selfcheck, "kernels", lambda context: two)
    context = context_of(tmp_path, "selfcheck")
    child.work(context, BY_NAME["selfcheck"].module, set())
    assert {row["name"] for row in rows_of(context)} == {"gram", "norm_add_relu"}
    document = Document.of_lines(context.stream.read(), True)
    assert {row["name"] for row in document.failures()} == {"norm_add_relu"}


def test_cudnns_fused_operations_are_given_what_makes_the_same_network(monkeypatch):
    def relu(x, weight, bias, stride, padding, dilation, groups):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        return (torch.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for name in ("resnet18", "resnext50_32x4d"):
        model = named.build(name)
        equality.scatter_norms(model)
        model.train()(torch.randn(8, 3, 32, 32))  # statistics other than 0 and 1
        expected = model.eval()(x)
        torch.testing.assert_close(cudnn.prepare(model, torch.float32)(x), expected, rtol=1e-3, atol=1e-4)
    assert "GPU" in cudnn.unavailable(torch.device("cpu"))
