"""The parts of a GPU's report that only a GPU runs, with a CPU that takes its place."""

import contextlib
import dataclasses
import types

import pytest
import torch
from injected_parts import TINY, Half, context_of, rows_of

from resnet_fused.backends import backends
from resnet_fused.backends.declaration import Kernel
from resnet_fused.backends.selfcheck.judge import Verdict
from resnet_fused.bench.gpu_report import child, cuda_graph, measure, models, selfcheck, warmup
from resnet_fused.bench.gpu_report.context import Context
from resnet_fused.bench.gpu_report.parts import BY_NAME
from resnet_fused.bench.gpu_report.stream import Document
from resnet_fused.bench.timing import Samples
from resnet_fused.ops import OPS
from resnet_fused.plan import devices
from resnet_fused.traffic.calls import Call, Spec
from resnet_fused.traffic.warmup import Warmed


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
    assert {"conv1x1", "conv1x1_join", "conv1x1_dgrad", "conv1x1_backward", "gram", "bn_stats"} <= ops
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
