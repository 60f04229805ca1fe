"""Peers that only evaluate: what they are asked, and that their results are compared."""

import contextlib

import numpy
import pytest
import torch
from torch import nn

from resnet_fused.bench import exported, peers, records, run
from resnet_fused.bench.timing import Rounds

ROUNDS = Rounds(at_least=2, at_most=2)


@pytest.fixture
def bench(monkeypatch):
    """Stock, and a peer that numpy evaluates, on small images."""
    monkeypatch.setattr(run.photos, "batches", lambda count, n, size: [torch.rand(n, 3, size, size)] * count)
    monkeypatch.setattr(run.memory, "saved_bytes", lambda forward, parameters: 1)
    stock = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    plan = run.Plan(2, 4, (2,), ROUNDS, ROUNDS, ROUNDS)
    models = {peers.STOCK: stock, peers.OURS: stock, "runtime": exported.Exported(stock, by_numpy)}
    report = records.Report({"device": "cpu"})
    return run.Bench(run.Options(), plan, torch.device("cpu"), models, contextlib.nullcontext(), report)


built = []


def by_numpy(model, x):
    built.append(x.shape)
    weight, bias = (t.detach().numpy() for t in model[-1].parameters())
    return lambda images: images.mean((2, 3), dtype=numpy.float32) @ weight.T + bias


def test_a_runtime_is_built_once_for_a_shape(bench):
    built.clear()
    bench.evaluation(2, lambda fraction: None)
    assert built == [(2, 3, 4, 4)]
    assert {(row.name, row.peer) for row in bench.report.rows if row.peer == "runtime"} == {
        ("evaluation, batch 2", "runtime")
    }


def test_a_peer_that_only_evaluates_has_what_training_moved(monkeypatch):
    pytest.importorskip("skimage")
    prepared, load = [], peers.load

    class Frozen:
        TRAINS = False
        unavailable = staticmethod(lambda device: "")

        @staticmethod
        def prepare(model):
            prepared.append(int(model.bn1.num_batches_tracked))
            return model.eval()

    monkeypatch.setattr(run.peers, "load", lambda name: Frozen if name == "frozen" else load(name))
    for part in ("equality", "blocks"):  # which have nothing to do with who evaluates
        monkeypatch.setattr(run.Bench, part, lambda bench, progress: None)
    options = run.Options("resnet18", batch=2, size=32, device="cpu", quick=True, peers=("frozen",))
    report = run.run(options)
    assert prepared and prepared[0] > 1
    named = {row.name.split(",")[0] for row in report.rows if row.peer == "frozen"}
    assert named == {"evaluation"}


def test_a_peer_that_evaluates_to_something_else_is_told(bench):
    stock = bench.models[peers.STOCK]
    bench.models["runtime"] = exported.Exported(
        bench.models[peers.STOCK], lambda model, x: lambda a: by_numpy(model, x)(a + 1)
    )
    with pytest.raises(run.Disagreement, match="batch 2 differs from stock's: runtime by"):
        bench.evaluation(2, lambda fraction: None)
    nothing = numpy.full((2, 10), numpy.nan, numpy.float32)
    bench.models["runtime"] = exported.Exported(stock, lambda model, x: lambda a: nothing)
    with pytest.raises(run.Disagreement, match="runtime by nan"):
        bench.evaluation(2, lambda fraction: None)


def test_new_images_reach_the_runtime(bench):
    peer = bench.models["runtime"]
    for _ in range(2):
        x = torch.rand(2, 3, 4, 4)
        torch.testing.assert_close(peer(x), bench.models[peers.STOCK](x).detach())


def test_what_a_runtime_needs_is_said():
    assert exported.missing(torch.device("cpu"), "torch", "no_such_runtime") == (
        "needs no_such_runtime; pip install 'resnet_fused[peers]'"
    )
    assert exported.missing(torch.device("cpu"), "torch") == ""
    assert exported.missing(torch.device("cuda"), "torch") == "is measured on CPUs only"


@pytest.mark.parametrize("name", peers.names())
def test_every_peer_says_what_it_can(name):
    peer = peers.load(name)
    assert isinstance(peer.unavailable(torch.device("cpu")), str)
    assert set(getattr(peer, "DTYPES", run.DTYPES)) <= set(run.DTYPES)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_runtime_evaluates_as_stock(name):
    peer = peers.load(name)
    reason = peer.unavailable(torch.device("cpu"))
    if reason:
        pytest.skip(f"the runtime {reason}")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(peer.prepare(model)(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_convolutions_alone_run_what_stock_runs(dtype):
    """Each convolution and its gradients, on what it has in the model, whose buffers stay as they were."""
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=2), nn.Flatten())
    alone, x, counts = peers.load("convolutions").prepare(model), torch.rand(2, 3, 4, 4), []
    for run_all in (lambda: model(x).float().sum().backward(), lambda: alone(x).sum().backward()):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            run_all()  # finds the convolutions
            with FlopCounterMode(display=False) as counter:
                run_all()
        counts.append(counter.get_flop_counts()["Global"])
    assert counts[0] == counts[1] and len(counts[0]) == 2
    assert int(model[1].num_batches_tracked) == 2
    assert alone.is_bound and alone(x).shape[0] == 2


def test_a_bound_is_not_compared(bench):
    class Bound(nn.Module):
        is_bound = True

        def forward(self, x):
            return torch.full((len(x), 10), float("nan"))

    bench.models["bound"] = Bound()
    bench.evaluation(2, lambda fraction: None)
    assert any(row.peer == "bound" for row in bench.report.rows)
