"""`examples/train.py`, run as users run it and stopped where nobody would stop it."""

import contextlib
import csv
import importlib
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from resnet_fused.models import BUILDERS

for needed in ("tqdm", "matplotlib", "mlxtend"):
    pytest.importorskip(needed)
resumable, resumed, train = map(importlib.import_module, ("resumable", "resumed", "train"))
SHORT, assert_same, final = resumed.SHORT, resumed.assert_same, resumed.final

ROOT = pathlib.Path(train.__file__).parents[1]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(BUILDERS, "toy", resumed.Toy)


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (train.Run, "train_step", 1),  # before anything was saved
        (train.Run, "train_step", 4),  # just after a checkpoint within an epoch
        (train.Run, "train_step", 6),  # in the next epoch
        (train.Run, "evaluate", 2),  # of averaged weights, between two epochs
        (resumable.os, "fsync", 3),  # a checkpoint that is not yet in its place
        (resumable.os, "replace", 2),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(owner, name, count, tmp_path):
    resumed.stop_and_go_on(tmp_path, owner, name, count)
    assert_same(final(tmp_path / "stopped"), final(tmp_path / "whole"))


def started(command, **environment):
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    )
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.plans_small  # as the other process
def test_a_process_that_was_killed_goes_on_with_the_same_bits(tmp_path):
    short = [train.__file__, "--take", 64, "--batch", 16, "--epochs", 2, "--save-every", 1, "--size", 16]
    process = started([*short, "--out", tmp_path / "killed"])
    checkpoint, begun = tmp_path / "killed" / "checkpoint.pt", time.monotonic()
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() - begun < 500
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    going_on = started([*short, "--out", tmp_path / "killed", "--resume"])
    train.main([*map(str, short[1:]), "--out", str(tmp_path / "whole")])
    output, _ = going_on.communicate(timeout=500)
    assert "goes on in epoch" in output, output
    assert_same(final(tmp_path / "killed"), final(tmp_path / "whole"))


def test_two_processes_go_on_with_the_same_bits(tmp_path):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("localhost", 0))
        ports = [free.getsockname()[1] for free in sockets]
    place = {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2"}
    both = [started([resumed.__file__, tmp_path, *ports], RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]
    outputs = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and "same" in outputs[0], "\n".join(outputs)
    assert "--sync-bn: of 2 process(es) on cpu, each has statistics of its own" in outputs[0]


def test_averages_are_of_averaged_weights_and_half_precision_runs(tmp_path):
    train.main([*SHORT, "--amp", "bf16", "--workers", "1", "--out", str(tmp_path)])
    state, log, weights = final(tmp_path)
    assert_same(dict(weights), {name[7:]: value for name, value in state["average"].items() if name[:7] == "module."})
    assert not torch.equal(weights["fc.weight"], state["model"]["fc.weight"])
    rows = list(csv.DictReader(log.splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and float(rows[1]["average_test_loss"]) > 0
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_accumulated_batches_make_the_step_of_one(tmp_path):
    """But for batch norm's statistics: the net has none of those that count in training."""
    BUILDERS["toy"] = lambda num_classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 256, num_classes))
    same = ["--model", "toy", "--take", "64", "--size", "16", "--epochs", "1", "--stock"]
    train.main([*same, "--batch", "16", "--out", str(tmp_path / "one")])
    train.main([*same, "--batch", "4", "--accumulate", "4", "--out", str(tmp_path / "four")])
    one, four = final(tmp_path / "one")[2], final(tmp_path / "four")[2]
    torch.testing.assert_close(one["1.weight"], four["1.weight"], rtol=1e-5, atol=1e-6)


def refused(capsys, *options):
    """The text with which a run is refused."""
    with pytest.raises(SystemExit) as caught:
        train.main(list(map(str, options)))
    return f"{caught.value} {capsys.readouterr().err}"


def test_what_is_refused(capsys, tmp_path):
    out = ["--out", tmp_path / "run"]
    assert "unknown model 'resnet21'" in refused(capsys, "--model", "resnet21", *out)
    assert "close are resnet18" in refused(capsys, "--model", "torchvision:resnet81", *out)
    assert "there is no folder nowhere" in refused(capsys, "--data", "nowhere", *out)
    assert "less than a step's 64; lower --batch" in refused(capsys, "--take", 10, *out)
    assert "0 is not a positive whole number" in refused(capsys, "--epochs", 0, *out)
    assert not (tmp_path / "run").exists()
    train.main([*SHORT, *map(str, out)])
    assert "--resume goes on with it" in refused(capsys, *SHORT, *out)
    text = refused(capsys, *SHORT, *out, "--resume", "--lr", 0.5, "--stock")
    assert "lr was 0.02, is 0.5; stock was False, is True" in text
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "cannot be read as a checkpoint" in refused(capsys, *SHORT, *out, "--resume")
    checkpoint.write_text("some words of a text file\n")
    assert "cannot be read as a checkpoint" in refused(capsys, *SHORT, *out, "--resume")
    torch.save({"fc.weight": torch.ones(1)}, checkpoint)
    assert "is not a checkpoint of train.py" in refused(capsys, *SHORT, *out, "--resume")


def test_a_loss_that_is_no_number_ends_the_run(capsys, tmp_path):
    text = refused(capsys, *SHORT, "--lr", 1e30, "--out", tmp_path)
    assert "in epoch" in text and "lower --lr" in text
    assert not (tmp_path / "weights.pt").exists()


def test_a_folder_of_images(capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for place, name in enumerate(("dark", "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                pixels = np.full((20, 24, 3), 40 + 150 * place + number, np.uint8)
                image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    options = ["--model", "toy", "--data", tmp_path, "--size", 16, "--batch", 4, "--epochs", 1]
    train.main([*map(str, options), "--out", str(tmp_path / "run")])
    assert final(tmp_path / "run")[2]["fc.weight"].shape == (2, 8)
    (tmp_path / "link").symlink_to(tmp_path)
    for spelled in (tmp_path / "train" / "..", tmp_path / "link", os.path.relpath(tmp_path)):
        train.main([*map(str, options), "--data", str(spelled), "--out", str(tmp_path / "run"), "--resume"])
    broken = tmp_path / "train" / "dark" / "2.png"
    whole = broken.read_bytes()
    for content in (whole[:50], b"no image", b""):
        broken.write_bytes(content)
        assert f"the image {broken} cannot be read: " in refused(capsys, *options, "--out", tmp_path / "other")
    text = refused(capsys, *options, "--workers", 1, "--out", tmp_path / "other")
    assert text.startswith(f"the image {broken} cannot be read: ") and len(text.splitlines()) == 1
    broken.write_bytes(whole)
    (tmp_path / "val" / "light").rename(tmp_path / "val" / "bright")
    assert "differ in their classes: bright, light" in refused(capsys, *options, "--out", tmp_path / "other")
    (tmp_path / "val").rename(tmp_path / "away")
    assert "nor the folders train and val" in refused(capsys, *options, "--out", tmp_path / "other")


def test_cifar10_from_disk(capsys, tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = {"data": rng.integers(0, 256, (8, 3072), dtype=np.uint8), "labels": [*range(8)]}
        (batches / name).write_bytes(pickle.dumps(data))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    options = ["--model", "toy", "--data", tmp_path, "--batch", 8, "--epochs", 1]
    train.main([*map(str, options), "--out", str(tmp_path / "run")])
    train.main([*map(str, options), "--size", "32", "--take", "99", "--out", str(tmp_path / "run"), "--resume"])
    other = [*options, "--out", tmp_path / "other"]
    assert "take was None, is 39" in refused(capsys, *options, "--take", 39, "--out", tmp_path / "run", "--resume")
    broken = batches / "data_batch_4"
    for content in (pickle.dumps(data)[:100], b"", b"text", pickle.dumps([1]), pickle.dumps({"data": data["data"]})):
        broken.write_bytes(content)
        text = refused(capsys, *other)
        assert text.startswith(str(broken)) and len(text.splitlines()) == 1
    for pixels, labels in ((data["data"][1:], data["labels"]), (data["data"], [*range(7), 10])):
        broken.write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
        assert f"{broken} does not hold CIFAR-10" in refused(capsys, *other)
    (batches / "batches.meta").write_bytes(b"text")
    assert f"{batches / 'batches.meta'} cannot be read" in refused(capsys, *other)
    for name in ("batches.meta", "data_batch_1"):
        (batches / name).unlink()
        assert f"has no {name}" in refused(capsys, *other), name
        assert f"has no {name}" in refused(capsys, *other, "--data", batches), name
        (batches / name).write_bytes(pickle.dumps({"label_names": [*"0123456789"]}))
