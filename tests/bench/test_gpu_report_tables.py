"""What a report of a GPU says, and how it reaches README."""

import importlib.util
import pathlib

import pytest

from resnet_fused.bench.gpu_report import tables
from resnet_fused.bench.gpu_report.stream import Document

ROOT = pathlib.Path(__file__).parents[2]


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
        names = ("results", "family", "coverage", "traffic", "support")
        for name in names[:-1]:
            monkeypatch.setattr(readme_tables, name, lambda: "")
        readme_tables.written("".join(f"<!-- {name} --><!-- /{name} -->" for name in names))


def test_a_document_is_what_was_written(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(document().to_json())
    assert Document.from_file(path) == document()
    assert tables.summary(document()).count("FAILED") == 1
    path.write_text('{"schema": 1, "rows": []}')
    with pytest.raises(ValueError, match="no report of schema"):
        Document.from_file(path)
