"""`examples/train.py`, run as users run it and stopped where nobody would stop it."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
import resumable
import train
from torch import nn

from resnet_fused.models import BUILDERS, resnet

SCRIPT = pathlib.Path(train.__file__)
#: Eight steps in two epochs, of two batches each.
SHORT = "--model toy --take 64 --batch 8 --accumulate 2 --epochs 2 --ema 0.9 --size 16 --save-every 3 --lr 0.02".split()


class Toy(nn.Module):
    """A block that is fused, and random numbers of its own."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.block = resnet.BasicBlock(8, 8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.drop(self.block(self.stem(x)).mean((2, 3))))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(BUILDERS, "toy", Toy)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def killed_at(monkeypatch, function, count):
    """From now on the `count`-th call of `function`, a name of an attribute, ends the run."""
    owner, name = function
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def final(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state, (folder / "log.csv").read_text(), torch.load(folder / "weights.pt", weights_only=True)


def assert_same(one, other, where="state"):
    """To the bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{place}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize(
    ("function", "count"),
    [
        ((train.Run, "train_step"), 1),  # before anything was saved
        ((train.Run, "train_step"), 4),  # just after a checkpoint within an epoch
        ((train.Run, "train_step"), 6),  # in the next epoch
        ((train.Run, "evaluate"), 2),  # of averaged weights, between two epochs
        ((resumable.os, "fsync"), 3),  # a checkpoint that is not yet in its place
        ((resumable.os, "replace"), 2),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(function, count, tmp_path, monkeypatch):
    train.main([*SHORT, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        killed_at(patch, function, count)
        with pytest.raises(Killed):
            train.main([*SHORT, "--out", str(tmp_path / "stopped")])
    resumable.seed(7)
    train.main([*SHORT, "--out", str(tmp_path / "stopped"), "--resume"])
    assert_same(final(tmp_path / "stopped"), final(tmp_path / "whole"))


def script(*options, wait=True, **environment):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, options)]
    env = {**os.environ, **environment}
    if not wait:
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_a_process_that_was_killed_goes_on_with_the_same_bits(tmp_path):
    small = ["--model", "resnet18", "--take", 64, "--batch", 16, "--epochs", 3, "--save-every", 1]
    process = script(*small, "--out", tmp_path / "killed", wait=False)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    started = time.monotonic()
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() - started < 200
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = script(*small, "--out", tmp_path / "killed", "--resume")
    assert "goes on in epoch" in resumed.stdout, resumed.stderr
    assert script(*small, "--out", tmp_path / "whole").returncode == 0
    assert_same(final(tmp_path / "killed"), final(tmp_path / "whole"))
