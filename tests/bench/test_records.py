"""Rows, their JSON, their table."""

import json
import subprocess

import pytest
import torch

from resnet_fused.bench import plots, records
from resnet_fused.bench.errors import Refused
from resnet_fused.bench.records import Report, Row


@pytest.fixture
def report():
    found = Report(records.provenance(torch.device("cpu"), model="resnet18"))
    times = {"eager": (200.0, 190.0, 210.0, 5), "fused": (100.0, 99.0, 101.0, 5)}
    found.rows += records.rows_of("step", "ms", times, {"fused": (1.9, 2.1)})
    found.rows += records.rows_of("step", "MB", {"eager": (50.0, 50.0, 50.0, 1), "fused": (25.0, 25.0, 25.0, 1)})
    found.rows += records.rows_of("evaluation", "ms", {"eager": (3.0, 2.0, 4.0, 5), "fused": (6.0, 5.0, 7.0, 5)})
    found.equality = [{"scope": "whole model", "kind": "output", "fused": 1e-7}]
    return found


def test_json_roundtrip(report):
    assert Report.from_json(report.to_json()) == report
    row = json.loads(report.to_json())["rows"][1]
    assert row == {
        "name": "step", "unit": "ms", "peer": "fused", "median": 100.0, "q10": 99.0, "q90": 101.0, "n": 5, "ratio": 2.0,
        "ratio_low": 1.9, "ratio_high": 2.1,
    }  # fmt: skip


def test_other_schema_is_refused(report):
    with pytest.raises(ValueError, match="schema 99; this version reads 1"):
        Report.from_json(report.to_json().replace('"schema": 1', '"schema": 99'))


def test_markdown(report):
    lines = report.markdown().splitlines()
    assert lines[0] == "| measurement | eager ms (q10-q90) | fused ms (q10-q90) | fused speedup | MB eager / fused |"
    assert lines[2] == "| step | 200 (190-210) | 100 (99.0-101) | 2.00x (1.90-2.10) | 50.0 / 25.0 = 0.50 |"
    assert lines[3] == "| evaluation | 3.00 (2.00-4.00) | 6.00 (5.00-7.00) | 0.50x |  |"
    assert "model resnet18" in lines[-1]


def test_a_peer_without_a_row_leaves_its_cell_empty(report):
    report.rows.append(Row("step", "ms", "compile", 150.0, 150.0, 150.0, 5, 200 / 150))
    lines = report.markdown().splitlines()
    assert [line.count("|") for line in lines[:4]] == [8] * 4
    assert "1.33x" in lines[2]


def test_provenance_names_what_decides_a_result(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "123")
    found = records.provenance(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert "MALLOC_MMAP_THRESHOLD_=123" in found["environment"]
    assert {"date", "device", "python", "triton", "resnet_fused", "git"} <= found.keys()


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1234"), (45.67, "45.7"), (1.234, "1.23"), (0.01234, "0.012")])
def test_three_digits(value, text):
    assert records.short(value) == text


def test_plot_writes_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    plots.plot(report, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    plots.plot(report, tmp_path / "bars.svg")
    assert "% of eager" in (tmp_path / "bars.svg").read_text() or (tmp_path / "bars.svg").stat().st_size > 1000


def test_unknown_peer_lists_the_peers():
    from resnet_fused.bench import peers

    assert peers.names()[:2] == ["eager", "fused"]
    with pytest.raises(Refused, match="unknown peer 'tpu'; accepted are compile"):
        peers.load("tpu")


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(records.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(records.os, "getloadavg", lambda: (1.9, 0.0, 0.0))
    assert records.busy() == ""
    monkeypatch.setattr(records.os, "getloadavg", lambda: (6.2, 0.0, 0.0))
    assert "load 6.2 on 4 cores" in records.busy()
    assert records.provenance(torch.device("cpu"))["load"] == "6.2"


def test_the_command_tells_no_folders(monkeypatch):
    words = ["/home/me/.venv/bin/python", "benchmarks/x.py", "--tests", "/home/me/timm/tests", "--log=/tmp/a b.txt"]
    monkeypatch.setattr(records.sys, "orig_argv", [*words, "--batch", "1"])
    assert records.command() == "python benchmarks/x.py --tests tests '--log=a b.txt' --batch 1"


def test_a_recorded_run_does_not_make_the_next_one_dirty(tmp_path):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", *identity, *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    code, result = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "gpu" / "runs.jsonl"
    result.parent.mkdir(parents=True)
    for file in (code, result):
        file.write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    head = git("rev-parse", "--short", "HEAD").strip()
    assert records.revision_of(tmp_path) == head
    result.write_text("1\n2\n")
    assert records.revision_of(tmp_path) == head
    code.write_text("2\n")
    assert records.revision_of(tmp_path) == f"{head}-dirty"
