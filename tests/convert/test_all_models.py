"""`benchmarks/all_models.py` on a short model of each file of timm's, and what it says of others."""

import importlib.util
import pathlib
import sys

import pytest
import torch
from torch import nn

from resnet_fused.models import Bottleneck
from resnet_fused.testing.vision import import_torchvision

try:
    import_torchvision()
    import timm  # noqa: F401
except ImportError as error:
    pytest.skip(f"timm or torchvision is not installed: {error}", allow_module_level=True)

ONE = {"layers": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def script():
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "all_models.py"
    spec = importlib.util.spec_from_file_location("all_models", path)
    module = sys.modules["all_models"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["all_models"]


@pytest.mark.parametrize(
    ("family", "module", "name", "options", "fused"),
    [
        ("timm", "resnet", "resnet50d", ONE, "19 of 19"),
        ("timm", "resnetv2", "resnetv2_18d", ONE, "13 of 15"),
        ("timm", "resnetv2", "resnetv2_50t", ONE, "18 of 20"),
        ("timm", "densenet", "densenetblur121d", {"block_config": (2, 2, 2, 2)}, "22 of 22"),
        ("timm", "resnest", "resnest14d", {}, "19 of 27"),
        ("timm", "res2net", "res2net50_48w_2s", ONE, "9 of 17"),
        ("timm", "sknet", "skresnet18", ONE, "20 of 24"),
        ("timm", "sknet", "skresnet50", ONE, "25 of 29"),
        ("timm", "regnet", "regnetx_002", {}, "44 of 44"),
        ("timm", "regnet", "regnety_002", {}, "44 of 70"),
        ("torchvision", "regnet", "regnet_y_400mf", {}, "53 of 85"),
    ],
)
def test_a_sample_agrees(script, family, module, name, options, fused):
    model = script.Model(family, module, name)
    assert model in list(script.models_of(family))
    verdict = script.check(model.build(**options), 64)
    assert verdict.verdict == script.AGREES, verdict
    assert verdict.text.startswith(f"{fused} convolutions"), verdict.text
    assert "at the call" not in verdict.text


def test_a_large_model_is_judged_by_the_same_figures(script, monkeypatch):
    """Whose parameters exist once."""
    found, compare = [], script.equality.compare

    def compared(*args, **options):
        found[-1] += compare(*args, **options)
        return found[-1][-1:]

    monkeypatch.setattr(script.equality, "compare", compared)
    for large in (200.0, 0.0):
        monkeypatch.setattr(script, "LARGE", large)
        torch.manual_seed(0)
        model = Net()
        model[0].append(Bottleneck(8, 2))
        before = {name: t.clone() for name, t in model.state_dict().items()}
        found.append([])
        assert script.check(model, 32).verdict == script.AGREES
        assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if "conv" in name)
    assert found[0] == found[1] and len(found[0]) > 40


@pytest.mark.parametrize(
    ("family", "module", "name", "millions"),
    [
        ("own", "resnet", "resnet18", 11.2),
        ("torchvision", "regnet", "regnet_y_400mf", 4.3),
        ("timm", "regnet", "regnety_2560", 1270),
    ],
)
def test_sizes_are_known_before_anything_is_built(script, family, module, name, millions):
    assert script.Model(family, module, name).millions() == pytest.approx(millions, rel=0.02)


class Net(nn.Sequential):
    """A convolution, a norm, a ReLU, and a classifier."""

    def __init__(self, norm=nn.BatchNorm2d):
        features = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU())
        super().__init__(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.fixture
def known(script, monkeypatch):
    """Three models in the place of the family's: one that agrees, one left stock, one that cannot be built."""
    makers = {
        "good": Net,
        "stock": lambda: Net(lambda c: nn.GroupNorm(2, c)),
        "other": lambda: nn.Sequential(Net(), nn.Conv2d(3, 3, 1)),
    }
    models = [script.Model("own", "net", name) for name in makers]
    monkeypatch.setattr(script, "models_of", lambda family: models if family == "own" else [])
    monkeypatch.setattr(script.Model, "build", lambda self: makers[self.name]())
    monkeypatch.setattr(script.records, "git_revision", lambda: "1234567")
    return models


def test_verdicts_and_exit_status(script, known, tmp_path, capsys):
    done = tmp_path / "checked.jsonl"
    options = ["--family", "own", "--size", "16", "--resume", str(done)]
    assert script.main([*options, "--only", "good"]) == 0
    assert script.main([*options, "--only", "[gs]*"]) == 0
    text = capsys.readouterr().out
    assert "own:good: agrees; 0 M; 1 of 1 convolutions" in text
    assert "own:stock: agrees, as nothing is fused" in text and "GroupNorm is not batch norm" in text
    assert "own's net: 1 agrees, 1 agrees, as nothing is fused" in text
    assert len(done.read_text().splitlines()) == 2  # the first was not judged again
    assert script.main(options) == 1
    text = capsys.readouterr().out
    assert "own:other: FAILED" in text and "1 FAILED, 1 agrees" in text


def test_a_line_that_was_cut_off_is_judged_again(script, known, tmp_path):
    done = tmp_path / "checked.jsonl"
    options = ["--family", "own", "--size", "16", "--resume", str(done), "--only"]
    assert script.main([*options, "[gs]*"]) == 0
    lines = done.read_text().splitlines()
    done.write_text(f"{lines[0]}\n{lines[1][:40]}")
    assert script.main([*options, "[gs]*"]) == 0
    assert done.read_text().splitlines() == lines


def test_what_a_dirty_tree_said_is_not_taken_for_what_it_says(script, known, tmp_path, monkeypatch):
    done = tmp_path / "checked.jsonl"
    options = ["--family", "own", "--size", "16", "--resume", str(done), "--only", "good"]
    monkeypatch.setattr(script.records, "git_revision", lambda: "1234567-dirty")
    assert (script.main(options), script.main(options)) == (0, 0)
    assert len(done.read_text().splitlines()) == 2


def test_what_disagrees_is_told(script, known, monkeypatch, capsys):
    fuse = script.resnet_fused.fuse

    def fuse_wrongly(model):
        with torch.no_grad():
            model[0][0].weight[0].mul_(-1)
        return fuse(model)

    monkeypatch.setattr(script.resnet_fused, "fuse", fuse_wrongly)
    assert script.main(["--family", "own", "--size", "16", "--only", "good"]) == 1
    text = capsys.readouterr().out
    assert "own:good: DISAGREES" in text and "    output in training: fused error" in text


def test_left_out_by_size_and_file(script, known, capsys):
    assert script.main(["--family", "own", "--max-parameters", "0.0001", "--only", "good"]) == 1
    assert script.main(["--family", "own", "--module", "elsewhere"]) == 1
    text = capsys.readouterr().out
    assert "own:good: left out, 0 M parameters" in text and "agrees" not in text
    assert text.count("no model was judged") == 2
