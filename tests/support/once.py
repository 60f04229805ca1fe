"""What one of a session's processes makes for all of them."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def made(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """The path called `name` which `make` was given to write to, by the first process that asks; others wait for it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path, begun = folder / name, folder / f"{name}.begun"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(begun)
            begun.rename(path)
    return path
