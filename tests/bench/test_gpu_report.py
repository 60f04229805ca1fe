"""The report of a GPU, as far as it goes without one: what survives a part that dies, and what each part writes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import injected_parts
import pytest
from injected_parts import TINY

from resnet_fused.bench.gpu_report import runner, tables
from resnet_fused.bench.gpu_report.parts import PARTS, Part
from resnet_fused.bench.gpu_report.stream import Document, Stream


@pytest.fixture
def injected(tmp_path, monkeypatch):
    """A function that makes a part of a name in `injected_parts`."""
    injected_parts.install(tmp_path)
    paths = [str(tmp_path), str(pathlib.Path(injected_parts.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    def part(name, share=1.0, item_seconds=60.0, checks=False):
        return Part(name, f"injected_{name}", share, item_seconds, checks)

    return part


def rows_of(document, part):
    return [row for row in document.rows if row["part"] == part]


def statuses(document, part):
    return [(row["item"], row["status"]) for row in rows_of(document, part)]


def gone(pid):
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def test_stream_survives_a_torn_line_and_figures_that_json_has_no_word_for(tmp_path):
    stream = Stream(tmp_path / "rows.jsonl")
    stream.write("row", part="a", value=float("nan"), deep={"x": [float("inf"), 1.5]})
    with stream.path.open("a") as file:
        file.write('{"kind": "row", "part": "a", "val')  # killed here
    stream.write("row", part="b", value=2)
    first, second = stream.read()
    assert first == {"kind": "row", "part": "a", "value": None, "deep": {"x": [None, 1.5]}}
    assert second == {"kind": "row", "part": "b", "value": 2}


def test_parts_that_die_leave_their_rows_and_the_rest_goes_on(tmp_path, injected):
    out = tmp_path / "report.json"
    parts = [injected("aborts"), injected("hangs", item_seconds=1.0, checks=True), injected("raises")]
    document = runner.run(parts, TINY, 300, out)
    assert Document.from_file(out) == document and document.complete
    assert not list(tmp_path.glob("*.jsonl"))
    assert statuses(document, "aborts") == [("item 1", "measured"), ("aborts", "died"), ("item 2", "measured")]
    assert "(SIGABRT)" in rows_of(document, "aborts")[1]["reason"]
    assert statuses(document, "hangs") == [
        ("item 1", "measured"),
        ("hangs", "measured"),
        ("hangs", "died"),
        ("item 2", "measured"),
    ]
    started, died = rows_of(document, "hangs")[1:3]
    assert "took more than 1 s" in died["reason"]
    assert gone(started["pid"]), "what a part had started outlived it"
    assert statuses(document, "raises") == [("missing", "error"), ("wrong", "failed"), ("item 1", "measured")]
    assert rows_of(document, "raises")[0]["reason"] == "AttributeError: no such op"
    # a check that hung is a failed check; a peer that is missing is none
    assert [row["item"] for row in document.failures()] == ["hangs", "wrong"]
    by_name = {part["name"]: part for part in document.parts}
    assert by_name["aborts"]["tries"] == by_name["hangs"]["tries"] == 2
    assert {part["status"] for part in document.parts} == {"done"}
    assert "FAILED raises: wrong: error 1, allowed 0.1" in tables.summary(document)


def test_a_part_ends_within_its_limit_and_the_next_gets_the_rest(tmp_path, monkeypatch, injected):
    monkeypatch.setattr(runner, "FAIR_SECONDS", 8.0)
    begun = time.monotonic()
    document = runner.run([injected("slow", checks=True), injected("raises")], TINY, 20, tmp_path / "report.json")
    assert time.monotonic() - begun < 20 + 8
    slow, raises = document.parts
    assert slow["limit"] == pytest.approx(10, abs=0.5) and slow["seconds"] < 12
    assert raises["limit"] == pytest.approx(20 - slow["seconds"], abs=2)
    rows = rows_of(document, "slow")
    assert slow["status"] in ("done", "cut off")  # by itself, unless the machine is very busy
    if slow["status"] == "done":
        assert rows[-1]["status"] == "skipped" and "no time left" in rows[-1]["reason"]
    assert all(row["part"] == "raises" for row in document.failures()), "no time is no failure"


COMMAND = """
import sys
from resnet_fused.bench.gpu_report.parts import Part
from resnet_fused.cli import gpu_report, main
names = sys.argv.pop(1).split(",")
gpu_report.PARTS = tuple(Part(name, f"injected_{name}", 1.0) for name in names)
gpu_report.BY_NAME = {part.name: part for part in gpu_report.PARTS}
sys.exit(main(["gpu-report", *sys.argv[1:]]))
"""


def command(out, *names):
    arguments = [",".join(names), "--device", "cpu", "--minutes", "5", "--models", "resnet18", "--out", str(out)]
    return [sys.executable, "-c", COMMAND, *arguments]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=("Ctrl-C", "SIGTERM"))
def test_an_ended_command_leaves_a_whole_document(tmp_path, injected, number, code):
    out = tmp_path / "report.json"
    stream = out.with_suffix(".rows.jsonl")
    with subprocess.Popen(command(out, "waits", "raises"), stdout=subprocess.PIPE, text=True) as process:
        ends = time.monotonic() + 60
        while time.monotonic() < ends and not (stream.exists() and '"item": "waits"' in stream.read_text()):
            time.sleep(0.1)
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == code
    document = Document.from_file(out)
    assert not document.complete and not stream.exists()
    assert statuses(document, "waits") == [("item 1", "measured")]
    assert [(part["name"], part["status"]) for part in document.parts] == [
        ("waits", "interrupted"),
        ("raises", "not run"),
    ]
    assert "Interrupted: parts are missing." in said


def test_the_exit_code_says_whether_a_check_failed(tmp_path, injected):
    out = tmp_path / "report.json"
    words = [*command(out, "raises", "waits"), "--parts", "raises"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.rstrip().endswith("1 FAILED")
    assert json.loads(out.read_text())["schema"] == "gpu-report 1"
    assert [part["name"] for part in Document.from_file(out).parts] == ["raises"]


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path):
    out = tmp_path / "report.json"
    options = ["--minutes", "0.5", "--quick", "--device", "cpu", "--models", "resnet18", "--out", str(out)]
    begun = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "gpu-report", *options], capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert time.monotonic() - begun < 30 + 20, "beside its minutes, imports and the last kill"
    document = Document.from_file(out)
    assert [part["name"] for part in document.parts] == [part.name for part in PARTS]
    assert {part["status"] for part in document.parts} <= {"done", "cut off", "not run"}
    assert document.complete and document.provenance["models"] == "resnet18"
    assert "git" in document.provenance and "driver" in document.provenance
    checked = {row["status"] for row in rows_of(document, "selfcheck")}
    assert "passed" in checked and checked <= {"passed", "skipped", "cut off"}


def test_interpreted_kernels_take_part(tmp_path, monkeypatch, injected):
    """Without a GPU Triton's kernels run through the same parts, on tiny shapes: a few, as tests/triton checks all."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    part = injected("interpreted", item_seconds=200.0, checks=True)
    document = runner.run([part], TINY, 400, tmp_path / "report.json")
    rows = rows_of(document, "interpreted")
    assert {(row["backend"], row["status"]) for row in rows} == {("triton", "passed")}
    assert {row["name"] for row in rows} == set(injected_parts.INTERPRETED)
