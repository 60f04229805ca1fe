"""What each part of a GPU's report measures and finds wrong, on the CPU and small shapes."""

import dataclasses
import importlib.util
import pathlib

import pytest
import torch
from test_gpu_report import TINY

from resnet_fused.backends import backends
from resnet_fused.backends.declaration import Kernel
from resnet_fused.bench import equality, named
from resnet_fused.bench.gpu_report import bandwidth, calls, child, cudnn, measure, tables
from resnet_fused.bench.gpu_report.calls import Call, Spec
from resnet_fused.bench.gpu_report.context import Context
from resnet_fused.bench.gpu_report.parts import BY_NAME, PARTS
from resnet_fused.bench.gpu_report.stream import Document, Stream
from resnet_fused.bench.timing import Samples
from resnet_fused.blocks import devices, plan
from resnet_fused.ops import OPS

ROOT = pathlib.Path(__file__).parents[2]


def context_of(tmp_path, part, settings=TINY):
    return Context(part, settings, Stream(tmp_path / "rows.jsonl"), 300, BY_NAME[part].checks)


def rows_of(context):
    return [line for line in context.stream.read() if line["kind"] == "row"]


@pytest.mark.parametrize("name", [part.name for part in PARTS])
def test_every_item_of_a_part_runs_or_says_why_not(tmp_path, name):
    context = context_of(tmp_path, name)
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
    monkeypatch.setattr(calls.plan, "fusing_all", lambda: plan.planning_for(devices.find("h100")))
    context = context_of(tmp_path, "bandwidth", Half())
    found = calls.calls_of(context, "resnet50", training)
    assert {"conv1x1_join", "conv1x1_backward", "gram_norm"} <= {call.op for call in found} or not training
    for call in found:
        arguments = call.drawn(torch.Generator().manual_seed(0))
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


@pytest.fixture
def readme_tables():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def document():
    """As of a GPU."""
    where = {"part": "selfcheck", "checks": True, "item": "x", "backend": "triton", "dtype": "bfloat16", "case": "odd"}
    rows = [where | {"status": "passed", "name": op} for op in ("gram", "conv1x1")]
    rows += [where | {"status": "failed", "name": "gram", "error": 1.0, "allowed": 0.1}]
    timed = {"part": "models", "status": "measured", "item": "resnet50", "name": "resnet50", "mode": "training"}
    timed |= {"lap": "total", "batch": 256}
    rows += [timed | {"peer": peer, "ms": ms, "ratio": 80 / ms} for peer, ms in (("eager", 80.0), ("fused", 50.0))]
    found = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-12-01", "torch": "2.14.1"}
    return Document(found, [], rows, [], True)


def test_recorded_reports_reach_readme(tmp_path, monkeypatch, readme_tables):
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.gpu() == "No report of a GPU is recorded yet."
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "h100.json").write_text(document().to_json())
    support = readme_tables.support()
    assert "FAILED on NVIDIA H100 80GB HBM3" in next(line for line in support.splitlines() if "`gram`" in line)
    assert "| passed on NVIDIA H100 80GB HBM3 |" in next(line for line in support.splitlines() if "`conv1x1`" in line)
    text = readme_tables.gpu()
    assert "| resnet50, training, batch 256 | 80.0 (1.00x) | 50.0 (1.60x) |" in text
    assert "FAILED selfcheck: x, odd: error 1.0, allowed 0.1" in text and "gpu/h100.json" in text
    with pytest.raises(SystemExit, match="0 places for gpu"):
        monkeypatch.setattr(readme_tables, "results", lambda: "")
        monkeypatch.setattr(readme_tables, "traffic", lambda: "")
        readme_tables.written("".join(f"<!-- {name} --><!-- /{name} -->" for name in ("results", "traffic", "support")))


def test_a_document_is_what_was_written(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(document().to_json())
    assert Document.from_file(path) == document()
    assert tables.summary(document()).count("FAILED") == 1
    path.write_text('{"schema": 1, "rows": []}')
    with pytest.raises(ValueError, match="no report of schema"):
        Document.from_file(path)
