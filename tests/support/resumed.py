"""Runs of `examples/train.py` that are stopped in the middle, in this process or, as a script, in one of several."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest
import resumable
import torch
import train
from torch import nn

from resnet_fused.models import BUILDERS, resnet

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


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def kill_at(patch: pytest.MonkeyPatch, owner: object, name: str, count: int) -> None:
    """From now on the `count`-th call of a function ends the run."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, name, counted)


def final(folder: pathlib.Path):
    """All that a run has left behind."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state, (folder / "log.csv").read_text(), torch.load(folder / "weights.pt", weights_only=True)


def assert_same(one, other, where: str = "it") -> None:
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


def main(port: str | None, *options: str) -> None:
    """``train.main``; `port`: where several processes meet, another for each run, as an old one may still be taken."""
    if port is not None:
        os.environ["MASTER_PORT"] = port
    train.main(list(options))


def stop_and_go_on(
    folder: pathlib.Path, owner: object, name: str, count: int, *options: str, ports=(None, None, None)
) -> None:
    """A whole run, one that is stopped at the `count`-th call of a function, and the rest of that."""
    options = (*SHORT, *options, "--out")
    main(ports[0], *options, str(folder / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, count)
        with pytest.raises(Killed):
            main(ports[1], *options, str(folder / "stopped"))
    resumable.seed(7)
    main(ports[2], *options, str(folder / "stopped"), "--resume")


if __name__ == "__main__":  # one of several processes
    BUILDERS["toy"] = Toy
    folder = pathlib.Path(sys.argv[1])
    stop_and_go_on(folder, train.Run, "train_step", 4, "--sync-bn", "--save-every", "1", ports=sys.argv[2:])
    if os.environ["RANK"] == "0":
        assert_same(final(folder / "stopped"), final(folder / "whole"))
        print("same")
