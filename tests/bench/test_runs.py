"""Runs are appended to their machine's file, and read from it."""

import argparse
import json
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from resnet_fused.bench import records, runs
from resnet_fused.bench.records import Report

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ZEN5 = "AMD EPYC (family 26, model 2), 2 cores, AVX512"


def report(device: str = ZEN5, **settings: str) -> Report:
    rows = records.rows_of("step", "ms", {"eager": (2.0, 1.0, 3.0, 5), "fused": (0.1 + 0.2, 0.2, 0.4, 5)})
    return Report({"date": "2026-11-26", "device": device, **settings}, rows, [{"kind": "output", "fused": 1e-7}])


@pytest.mark.parametrize(
    ("device", "machine"),
    [
        (ZEN5, "epyc-zen5-2core"),
        ("AMD EPYC, 2 cores, AVX512", "epyc-avx512-2core"),
        ("AMD EPYC 7B13 (family 25, model 1), 8 cores, AVX2", "epyc-7b13-avx2-8core"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 79), 4 cores, AVX2", "xeon-avx2-4core"),
        ("AMD Ryzen 9 7950X 16-Core Processor (family 25, model 97), 32 cores, AVX512", "ryzen-9-7950x-avx512-32core"),
        ("aarch64, 4 cores, NO AVX", "aarch64-no-avx-4core"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_machines(device, machine):
    assert runs.machine_of({"device": device}) == machine


def test_this_machine_has_a_name_of_its_parts():
    found = runs.machine_of(records.provenance(torch.device("cpu")))
    assert re.fullmatch(r"([a-z0-9]+-)+\d+core", found)
    assert "family" not in found


def test_runs_are_appended_and_read(tmp_path):
    assert runs.read(tmp_path) == []
    first, second = report(dtype="f32"), report(dtype="bf16")
    assert runs.record(tmp_path, first) == "epyc-zen5-2core"
    text = "| a |\n| \u2028 |"
    runs.record(tmp_path, text, "pointwise", {"date": "2026-11-27", "device": ZEN5})
    before = (tmp_path / "epyc-zen5-2core" / "runs.jsonl").read_bytes()
    runs.record(tmp_path, second)
    runs.record(tmp_path, report("AMD EPYC, 2 cores, AVX2"))
    assert (tmp_path / "epyc-zen5-2core" / "runs.jsonl").read_bytes().startswith(before)
    found = runs.read(tmp_path, "epyc-zen5-2core")
    assert [run.result for run in found] == [first, text, second]
    assert [run.kind for run in found] == ["bench", "pointwise", "bench"]
    assert found[1].place == "epyc-zen5-2core/runs.jsonl:2"
    assert found[1].markdown() == f"{text}\n\ndate 2026-11-27; device {ZEN5}"
    assert found[2].markdown() == second.markdown()
    assert [run.machine for run in runs.read(tmp_path)] == ["epyc-avx2-2core", *["epyc-zen5-2core"] * 3]


def test_what_cannot_be_read_is_named(tmp_path):
    runs.record(tmp_path, report())
    with pytest.raises(ValueError, match="no runs of 'cray'; there are runs of epyc-zen5-2core"):
        runs.read(tmp_path, "cray")
    path = tmp_path / "epyc-zen5-2core" / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:100] + "\n")
    with pytest.raises(ValueError, match=r"runs.jsonl:2: Unterminated"):
        runs.read(tmp_path)
    for kind in ("bench", "pointwise"):
        other = json.loads(whole) | {"schema": 99, "kind": kind, "text": ""}
        path.write_text(whole + json.dumps(other) + "\n")
        with pytest.raises(ValueError, match=r"runs.jsonl:2: this is a report of schema 99"):
            runs.read(tmp_path)


WRITER = """
import pathlib, sys
from resnet_fused.bench import runs
sys.stdin.readline()
for number in range(40):
    runs.record(pathlib.Path(sys.argv[1]), sys.argv[2] * 20000, "table", {"device": "GPU", "number": number})
"""


def test_runs_that_end_together_do_not_mix(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, name], cwd=ROOT, stdin=subprocess.PIPE)
        for name in ("a", "b")
    ]
    for writer in writers:
        writer.stdin.write(b"\n")
        writer.stdin.close()
    assert [writer.wait() for writer in writers] == [0, 0]
    found = runs.read(tmp_path, "gpu")
    for name in ("a", "b"):
        assert [run.provenance["number"] for run in found if run.result == name * 20000] == list(range(40))
    assert len(found) == 80


def test_what_a_script_prints_is_recorded(tmp_path, capsys):
    with runs.printing("pointwise", tmp_path, dtype="f32"):
        print("| a |\n| 1 |\n", flush=True)
    (run,) = runs.read(tmp_path)
    assert (run.kind, run.result, run.provenance["dtype"]) == ("pointwise", "| a |\n| 1 |", "f32")
    assert run.provenance["command"] == records.command()
    assert capsys.readouterr().out.split() == run.markdown().split()
    with runs.printing("pointwise", None):
        print("not kept")
    with pytest.raises(RuntimeError), runs.printing("pointwise", tmp_path):
        raise RuntimeError
    assert len(runs.read(tmp_path)) == 1


def test_a_folder_is_asked_for_before_the_run(tmp_path):
    assert runs.results_folder(str(tmp_path)) == tmp_path
    with pytest.raises(argparse.ArgumentTypeError, match="no folder that can be written to"):
        runs.results_folder(str(tmp_path / "none"))


def test_recorded_runs_lie_in_their_machines_folder():
    for machine in runs.machines(RESULTS):
        lines = (RESULTS / machine / "runs.jsonl").read_text().splitlines()
        for run, line in zip(runs.read(RESULTS, machine), lines, strict=True):
            assert run.result and {"date", "git"} <= run.provenance.keys(), run.place
            if "was" not in json.loads(line):  # their devices were not told apart yet
                assert runs.machine_of(run.provenance) == machine, run.place


def test_quoted_runs_are_recorded():
    recorded = {run.place for run in runs.read(RESULTS)}
    files = [path for folder in ("resnet_fused", "csrc", "benchmarks") for path in (ROOT / folder).rglob("*.[pch]*")]
    texts = [path.read_text() for path in [*files, ROOT / "README.md"] if path.suffix in (".py", ".h", ".cpp", ".md")]
    quoted = set(re.findall(r"benchmarks/results/([\w-]+/runs\.jsonl(?::|#L)\d+)", "\n".join(texts)))
    assert len(quoted) >= 3
    assert {place.replace("#L", ":") for place in quoted} <= recorded


def test_the_reader_lists_and_prints():
    script = ROOT / "benchmarks" / "results.py"

    def printed(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=ROOT, check=False)

    machine = runs.machines(RESULTS)[-1]
    found = runs.read(RESULTS, machine)
    assert len(printed(machine).stdout.splitlines()) == 2 + len(found)
    assert printed(machine, "1").stdout == found[0].markdown() + "\n"
    beyond = printed(machine, str(len(found) + 1))
    assert beyond.returncode == 2 and "has no line" in beyond.stderr
