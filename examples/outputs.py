"""Where the examples write: a folder that one run holds at a time, and errors that name what cannot be written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from torch import distributed

LOCK = "running.lock"
#: What a run writes beside and then puts in its place; one that was killed has left the former.
REPLACED = ("checkpoint.pt", "weights.pt")

_locks: set[int] = set()


def _close_locks() -> None:
    """A lock lasts until all who have its file open are gone: those who read images must not outlive the run in it."""
    for lock in _locks:
        os.close(lock)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


@contextlib.contextmanager
def writing(path: pathlib.Path, *others: type[Exception]) -> Iterator[None]:
    """Within the block `path` is written; where it cannot be (a full disk), the program ends with a line that says so.

    Args:
        others: what else than OSError means that.
    """
    try:
        yield
    except (OSError, *others) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch's names a position in the file
        reason = cause.strerror if isinstance(cause, OSError) else str(error).partition("\n")[0]
        raise SystemExit(f"{path} cannot be written: {reason}") from error


def beside(path: pathlib.Path) -> pathlib.Path:
    """Where `path` is written before it is put in its place; no other process writes there."""
    return path.with_name(f"{path.name}.{os.getpid()}.new")


@contextlib.contextmanager
def held(folder: pathlib.Path, name: str = LOCK) -> Iterator[None]:
    """Within the block `folder` is there, and nobody else holds it by `name`; if it was not there and stays empty, it
    goes again.

    Raises:
        SystemExit: it cannot be made or written, or another run holds it.
    """
    path, made, lock = folder / name, [], None
    try:
        try:
            made = [place for place in (folder, *folder.parents) if not place.exists()]
            while lock is None:
                folder.mkdir(parents=True, exist_ok=True)
                lock = _locked(path)
        except OSError as error:
            reason = "is no folder" if folder.is_file() else f"cannot be made or written: {error.strerror}"
            raise SystemExit(f"--out: {folder} {reason}") from error
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)  # while it is held: who opened it sees that it is gone
            _locks.discard(lock)
            os.close(lock)
        with contextlib.suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _locked(path: pathlib.Path) -> int | None:
    """An open file with the only lock on it, or None: whoever held it before has removed it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(file), path.stat()):
            os.close(file)
            return None
        os.ftruncate(file, 0)
        os.write(file, f"{os.uname().nodename}, process {os.getpid()}".encode())
    except BlockingIOError:
        holder = os.read(file, 200).decode(errors="replace")
        os.close(file)
        raise SystemExit(
            f"another run is writing to {path.parent} ({holder}); if its launcher was killed, the workers may have "
            "survived it: end them, or give another --out"
        ) from None
    except OSError:
        os.close(file)
        raise
    _locks.add(file)
    return file


@contextlib.contextmanager
def held_together(folder: pathlib.Path) -> Iterator[None]:
    """:func:`held` by the first of all processes, for all of them, and rid of what killed runs left half written.

    Raises:
        SystemExit: it was refused; the first process says why, the others end too.
    """
    together = distributed.is_initialized()
    first = not together or distributed.get_rank() == 0
    with contextlib.ExitStack() as stack:
        refusal: list[str | None] = [None]
        if first:
            try:
                stack.enter_context(held(folder))
            except SystemExit as error:
                refusal = [str(error)]
            else:
                for stale in (stale for name in REPLACED for stale in folder.glob(f"{name}.*new")):
                    stale.unlink()
        if together:
            distributed.broadcast_object_list(refusal, 0)
        if refusal[0] is not None:
            raise SystemExit(refusal[0] if first else 1)
        yield


def held_by_name(results: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """:func:`held` for files that are called `results` with suffixes."""
    if not results.name:
        raise SystemExit(f"--out: {results} is a folder; give a name in it, without suffix")
    return held(results.parent, f"{results.name}.lock")
