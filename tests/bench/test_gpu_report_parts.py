"""What each part of a GPU's report measures and finds wrong, on the CPU and small shapes."""

import contextlib
import dataclasses
import pathlib
import types

import pytest
import torch
from injected_parts import TINY

from resnet_fused.backends import backends
from resnet_fused.backends.declaration import Kernel
from resnet_fused.backends.selfcheck.judge import Verdict
from resnet_fused.bench import equality, named
from resnet_fused.bench.gpu_report import bandwidth, calls, child, cuda_graph, cudnn, measure, models, selfcheck, warmup
from resnet_fused.bench.gpu_report.context import Context
from resnet_fused.bench.gpu_report.parts import BY_NAME, PARTS
from resnet_fused.bench.gpu_report.stream import Document, Stream
from resnet_fused.bench.timing import Samples
from resnet_fused.ops import OPS
from resnet_fused.plan import devices
from resnet_fused.traffic.calls import Call, Spec
from resnet_fused.traffic.warmup import Warmed


def context_of(tmp_path, part, settings=TINY):
    return Context(part, settings, Stream(tmp_path / "rows.jsonl"), 300, BY_NAME[part].checks)


def rows_of(context):
    return [line for line in context.stream.read() if line["kind"] == "row"]


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
    stats = {call: count for call, count in found.items() if call.op == "bn_stats"}
    assert sum(stats.values()) == 20
    shapes = {dict(call.arguments)["z"].shape: count for call, count in stats.items()}
    assert shapes == {(2, 64, 16, 16): 1, (2, 64, 8, 8): 4, (2, 128, 4, 4): 5, (2, 256, 2, 2): 5, (2, 512, 1, 1): 5}


@dataclasses.dataclass(frozen=True)
class Half:
    """Settings in the dtype of a GPU."""

    models: tuple = ("resnet50",)
    batch: int = 2
    size: int = 32
    device: str = "cpu"
    quick: bool = True
    dtype: torch.dtype = torch.bfloat16


@pytest.mark.parametrize("training", [True, False], ids=("training", "evaluation"))
def test_drawn_arguments_of_a_gpus_plan_leave_no_right_kernel_in_doubt(tmp_path, monkeypatch, training):
    """The reference in bfloat16 stands for a right kernel: a sign near zero, or a variance below it, would fail it."""
    monkeypatch.setattr(calls.devices, "of", lambda device: devices.find("h100"))
    context = context_of(tmp_path, "bandwidth", Half())
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
    context = context_of(tmp_path, "selfcheck")
    child.work(context, BY_NAME["selfcheck"].module, set())
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


class Graph:
    """A CUDA graph on the CPU: what is captured has run, and a replay runs nothing."""

    replays = 0

    def replay(self):
        Graph.replays += 1


@pytest.fixture
def captures(monkeypatch):
    """Graphs that are captured on the CPU, whatever device a report is of."""

    def do_nothing(*args, **kwargs):
        return contextlib.nullcontext()

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"CUDAGraph": Graph, "graph": do_nothing, "stream": do_nothing, "synchronize": do_nothing}
    fakes |= {"Stream": lambda: stream, "current_stream": lambda: stream}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Graph, "replays", 0)


def test_graphs_are_compared_with_plain_steps_and_timed_beside_them(tmp_path, monkeypatch, captures):
    monkeypatch.setattr(Context, "on_gpu", True)
    context = context_of(tmp_path, "cuda_graph")
    child.work(context, BY_NAME["cuda_graph"].module, set())
    rows = rows_of(context)
    peers = {"eager", "eager, CUDA graph", "fused", "fused, CUDA graph"}
    timed = {(row["mode"], row["batch"], row["peer"]) for row in rows if row["status"] == "measured"}
    wanted = (("evaluation", 1), ("evaluation", 2), ("training", 2))
    assert timed == {(*what, peer) for what in wanted for peer in peers}
    values = [row for row in rows if row["lap"] == "values"]
    assert len(values) == 6 and {row["status"] for row in values} == {"passed"}
    assert Graph.replays > len(values)


def test_what_a_graph_got_wrong_is_a_failure(tmp_path, monkeypatch, captures):
    monkeypatch.setattr(Context, "on_gpu", True)
    monkeypatch.setattr(cuda_graph, "captured", lambda step: (Graph(), step() * 1.1))
    context = context_of(tmp_path, "cuda_graph")
    context.item = "a test"
    cuda_graph.measure(context, "resnet18", 2, False)
    failed = Document.of_lines(context.stream.read(), True).failures()
    assert {row["peer"] for row in failed} == {"eager, CUDA graph", "fused, CUDA graph"}


def test_calls_that_cannot_be_captured_are_timed_one_by_one(captures):
    x, cuda = torch.ones(4), torch.device("cuda")

    def refuses():
        raise RuntimeError("operation not permitted when stream is capturing")

    assert measure.captured([lambda: x + 1], cuda) is not None
    assert measure.captured([refuses], cuda) is None


def test_every_configuration_of_a_gpus_plan_is_checked(tmp_path, monkeypatch):
    """As `verify --model` does it; nothing runs here."""
    pytest.importorskip("triton", reason="Triton is not installed")
    asked = []

    def check_call(op, args, kwargs, device):
        asked.append((op, {t.device.type for t in args if isinstance(t, torch.Tensor)}, kwargs, device.type))
        return [Verdict(op, "triton", "bfloat16", "a test", "failed" if op == "gram" else "passed")]

    monkeypatch.setattr(Context, "on_gpu", True)
    monkeypatch.setattr(devices, "of", lambda device: devices.find("h100"))
    monkeypatch.setattr(selfcheck, "check_call", check_call)
    monkeypatch.setattr(selfcheck, "kernels", lambda context: ())
    context = context_of(tmp_path, "selfcheck", Half(size=64))
    child.work(context, BY_NAME["selfcheck"].module, set())
    ops = {op for op, *_ in asked}
    assert {"conv1x1", "conv1x1_join", "conv1x1_dgrad", "conv1x1_wgrad", "conv1x1_backward", "gram", "bn_stats"} <= ops
    assert all(rest == [{"meta"}, {}, "cpu"] for _, *rest in asked)
    assert len(asked) > 30 and len(rows_of(context)) == len(asked)
    assert {row["name"] for row in Document.of_lines(context.stream.read(), True).failures()} == {"gram"}


def test_what_does_not_compile_is_a_failure(tmp_path, monkeypatch):
    made = []

    def compile_nothing(model, example):
        made.append((model.training, tuple(example.shape), example.dtype))
        return Warmed(53, 52, 1.0, ("gram_kernel: out of registers",))

    monkeypatch.setattr(warmup.resnet_fused, "warmup", compile_nothing)
    monkeypatch.setattr(Context, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    context = context_of(tmp_path, "warmup")
    child.work(context, BY_NAME["warmup"].module, set())
    assert made == [(True, (2, 3, 32, 32), torch.float32), (False, (2, 3, 32, 32), torch.float32)]
    assert [row["status"] for row in rows_of(context)] == ["measured", "failed"] * 2


class Product:
    """A tiled kernel timed by its tile: twice the rows are faster; with other columns it is fastest, and wrong."""

    KEY = ("conv1x1", 90, 4, 16, 16)

    def __init__(self, configs):
        self.configs = configs

    def run(self, *args):
        results = OPS["conv1x1"].reference(*args)
        return tuple(2 * t for t in results) if self.config.block_n != self.default.block_n else results

    @property
    def config(self):
        return self.configs.config(*self.KEY)

    @property
    def default(self):
        return self.configs.DEFAULTS["conv1x1"](*self.KEY[1:])

    def time(self, *args):
        ms = 0.1 if self.config.block_n != self.default.block_n else 128 / self.config.block_m
        return measure.Timing(Samples(torch.tensor([ms]).numpy()), "a test")


def test_a_sweep_proposes_what_is_right_and_faster_and_changes_nothing(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from resnet_fused.backends.triton import configs
    from resnet_fused.bench.gpu_report import sweep

    product, triton = Product(configs), backends()["triton"]
    monkeypatch.setitem(triton.kernels, "conv1x1", Kernel(lambda *a: product.run(*a), (torch.float32,)))
    monkeypatch.setattr(measure, "time_calls", product.time)
    specs = [
        ("x", Spec("x", (2, 16, 4, 4), (256, 1, 64, 16), torch.float32)),
        ("weight", Spec("weight", (16, 16, 1, 1), (16, 1, 1, 1), torch.float32)),
    ]
    context = context_of(tmp_path, "sweep", dataclasses.replace(TINY, quick=False))
    before = dict(configs.TUNED)
    sweep.sweep(context, Call("conv1x1", tuple(specs)), 3, set())
    assert before == configs.TUNED and product.config == product.default
    rows = rows_of(context)
    assert {row["status"] for row in rows} == {"measured", "error"}  # an error: fast and wrong
    assert len(rows) >= 8 and sum(row.get("in_use", False) for row in rows) == 1
    (line,) = Document.of_lines(context.stream.read(), True).tuned
    assert (line["op"], line["capability"], line["columns"], line["depth"]) == ("conv1x1", 90, 16, 16)
    assert line["config"] == dataclasses.asdict(dataclasses.replace(product.default, block_m=256))
    assert line["ms"] < line["ms_in_use"]


def test_what_explain_predicts_is_reported_as_a_range(tmp_path, monkeypatch):
    """On a board that it knows: both ends and the host's part, for each peer."""
    context = context_of(tmp_path, "models")
    monkeypatch.setattr(type(context), "on_gpu", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: devices.DEVICES["h100"].reported)
    models.predicted(context, "resnet18")
    rows = {row["peer"]: row for row in rows_of(context)}
    assert rows.keys() == {"eager", "fused", "compile"}
    for row in rows.values():
        assert 0 < row["predicted_ms"] < row["predicted_high_ms"] and row["predicted_host_ms"] > 0
        assert row["predicted_high_ms"] >= row["predicted_host_ms"]
