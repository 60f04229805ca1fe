"""Checkpoints that a run may be killed over: the file is whole at any moment, and resuming from it changes no bit."""

from __future__ import annotations

import os
import pathlib
import random

import numpy as np
import outputs
import torch
from asked import first_line
from torch import distributed


def save(state: dict, path: pathlib.Path) -> None:
    """Write `state` to `path`, so that whenever the process or the machine stops, the old or the new file is there.

    Raises:
        SystemExit: it cannot be written, as where the disk is full; the old file stays.
    """
    beside = outputs.beside(path)
    with outputs.writing(path, RuntimeError):  # torch raises that over the OSError
        try:
            with open(beside, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, RuntimeError):
            beside.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name too is on disk
        finally:
            os.close(folder)


def load(path: pathlib.Path, settings: dict[str, object]) -> dict:
    """The state in `path`, if it is of a run with `settings`.

    Raises:
        SystemExit: it is no such file, or one of another run; the text says which settings differ.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is in other files can raise anything
        raise SystemExit(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(state, dict) or "settings" not in state:
        raise SystemExit(f"{path} is not a checkpoint of train.py, whose entries are settings, model, optimizer, ...")
    theirs = state["settings"]
    differ = [
        f"{name} was {theirs.get(name, 'not there')!r}, is {settings.get(name, 'not there')!r}"
        for name in sorted(theirs.keys() | settings.keys())
        if theirs.get(name) != settings.get(name)
    ]
    if differ:
        raise SystemExit(f"{path} is of another run: {'; '.join(differ)}. Ask for the same, or give another --out")
    return state


def seed(number: int) -> None:
    """Start all random number generators of this process from `number`, of which the last 32 bits count."""
    number %= 2**32  # NumPy takes no more
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def random_states() -> list[dict]:
    """The states of all random number generators, of each process."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    mine = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
    }
    if not distributed.is_initialized():
        return [mine]
    gathered: list[dict] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine)
    return gathered


def restore_random(states: list[dict]) -> None:
    """Set this process's random number generators to what :func:`random_states` found."""
    mine = states[distributed.get_rank() if distributed.is_initialized() else 0]
    torch.set_rng_state(mine["torch"])
    if mine["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine["cuda"])
    version, keys, gauss = mine["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = mine["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
