"""Folders that one run holds, and what is said where one cannot be written."""

import importlib
import os
import resource
import sys
import warnings

import pytest
import torch

for needed in ("tqdm", "matplotlib", "mlxtend"):
    pytest.importorskip(needed)
outputs, results, resumable, train = map(importlib.import_module, ("outputs", "results", "resumable", "train"))


def refusal(function, *arguments):
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    return str(caught.value)


def test_a_folder_is_held_by_one_run(tmp_path):
    """As by the workers that outlived their launcher, so that the next run must not write there."""
    folder = tmp_path / "deep" / "run"
    with outputs.held(folder):
        text = refusal(train.main, ["--resume", "--out", str(folder)])
        assert f"another run is writing to {folder}" in text and f"process {os.getpid()})" in text
        assert "may have survived" in text
        with outputs.held(folder, "another"):
            pass
        assert (folder / outputs.LOCK).exists()
    assert list(tmp_path.iterdir()) == []  # nothing was written, so nothing is left
    with outputs.held(folder):
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    original, seen = outputs.fcntl.flock, []

    def late(file, how):
        if not seen:
            (tmp_path / outputs.LOCK).unlink()
        seen.append(file)
        original(file, how)

    monkeypatch.setattr(outputs.fcntl, "flock", late)
    with outputs.held(tmp_path):
        assert len(seen) == 2
        assert "another run" in refusal(outputs.held(tmp_path).__enter__)


def test_a_process_that_reads_images_holds_no_lock(tmp_path):
    with outputs.held(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are threads; the child calls nothing of theirs
        child = os.fork()
        if not child:
            os._exit(len(outputs._locks) + any(os.path.samestat(os.stat(tmp_path / outputs.LOCK), s) for s in opened()))
        assert os.waitpid(child, 0)[1] == 0
        assert "another run" in refusal(outputs.held(tmp_path).__enter__)


def opened():
    for file in range(256):
        try:
            yield os.fstat(file)
        except OSError:
            continue


def test_what_killed_runs_left_half_written_is_removed(tmp_path):
    stale = [tmp_path / name for name in ("checkpoint.pt.new", "checkpoint.pt.17.new", "weights.pt.5.new")]
    kept = [tmp_path / name for name in ("checkpoint.pt", "weights.pt", "notes.new")]
    for path in (*stale, *kept):
        path.write_text("something")
    with outputs.held_together(tmp_path):
        assert {*tmp_path.iterdir()} == {*kept, tmp_path / outputs.LOCK}
    assert str(os.getpid()) in outputs.beside(kept[0]).name


@pytest.fixture
def full(monkeypatch):
    """No file may grow beyond 20,000 bytes: to who writes it that is what a full disk is.

    But for bytecode, which Python would leave cut off, for all who import that later.
    """
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("count", [5_000, 500_000])
def test_where_the_disk_is_full_the_old_checkpoint_stays(count, tmp_path, full):
    path = tmp_path / "checkpoint.pt"
    resumable.save({"a": torch.arange(3)}, path)
    before = path.read_bytes()
    text = refusal(resumable.save, {"a": torch.zeros(count)}, path)
    assert text == f"{path} cannot be written: File too large"
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_tables_and_pictures_say_where_they_cannot_be_written(tmp_path, full):
    text = refusal(results.write_csv, [{"a": "x" * 30_000}], tmp_path / "log.csv")
    assert text == f"{tmp_path / 'log.csv'} cannot be written: File too large"
    figure, _ = results.axes(1, ["title"])
    assert "cannot be written: No such file" in refusal(results.finish, figure, tmp_path / "none" / "a.png")


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    scripts = {
        "train": [],
        "finetune": ["--model", "resnet20", "--weights", "none"],
        "degradation": ["--depths", "8"],
        "same_training": [],
    }
    for name, options in scripts.items():
        script = importlib.import_module(name)
        monkeypatch.setattr(script.image_data, "digits", lambda: pytest.fail("was read"))
        for out in ("file/run", "file/deep/run"):
            text = refusal(script.main, [*options, "--out", str(tmp_path / out)])
            assert text.startswith(f"--out: {tmp_path / 'file'}") and len(text.splitlines()) == 1, (name, text)
    assert f"{tmp_path / 'file'} is no folder" in refusal(train.main, ["--out", str(tmp_path / "file")])
    assert "give a name in it" in refusal(importlib.import_module("same_training").main, ["--out", "."])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
