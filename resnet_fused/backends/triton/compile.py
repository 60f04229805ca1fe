"""Compile launches in several processes, into Triton's cache on disk, where a later launch finds them.

A worker is a Python of its own that runs this module: it needs no GPU, touches none, and does not import the user's
script again, as a pool of `multiprocessing` would. It takes each launch through Triton's own argument binding, with
stand-ins for tensors and a driver that only names its target, so that what it compiles has the key that a real launch
looks up. Jobs and answers are pickles on its standard input and output.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable

import torch

from .trace import Launch

MOST_WORKERS = 32


@dataclasses.dataclass(frozen=True)
class Pointer:
    """What Triton sees of a tensor."""

    dtype: torch.dtype
    address: int  # all that matters is whether 16 divides it

    def data_ptr(self) -> int:
        return self.address


@dataclasses.dataclass(frozen=True)
class Job:
    """A launch, without its tensors."""

    module: str
    kernel: str
    values: dict
    options: dict
    arch: int


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a job."""

    kernel: str
    seconds: float
    cached: bool = False  # it had been compiled before
    error: str = ""


def job(launch: Launch, arch: int) -> Job:
    """What a worker is sent for a launch on a card of this architecture."""
    values = {name: _sent(name, value, launch) for name, value in launch.values.items()}
    return Job(launch.kernel.fn.__module__, launch.kernel.fn.__name__, values, launch.options, arch)


def _sent(name: str, value, launch: Launch):
    if not isinstance(value, torch.Tensor):
        return value
    (aligned,) = (part[2] for part in launch.binary if len(part) == 3 and part[0] == name)
    return Pointer(value.dtype, 0 if aligned else 1)


def different(launches: Iterable[Launch]) -> list[Launch]:
    """One launch for each binary; those of the largest kernels, which take longest, first."""
    found = {}
    for launch in launches:
        found.setdefault(launch.binary, launch)
    return sorted(found.values(), key=lambda launch: -len(launch.values))


def compile_all(
    launches: Iterable[Launch], arch: int, workers: int = 0, tell: Callable[[Done, int], None] | None = None
) -> list[Done]:
    """Compile each binary of `launches` once.

    Args:
        arch: compute capability as one number.
        workers: processes; 0: one for each core that this process may use.
        tell: called after each job, with what became of it and how many jobs there are.

    Returns:
        One entry for each binary; `error` tells of those that do not compile.
    """
    jobs = [job(launch, arch) for launch in different(launches)]
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for each in jobs:
        waiting.put(each)
    done: list[Done] = []
    lock = threading.Lock()

    def note(result: Done) -> None:
        with lock:
            done.append(result)
            if tell is not None:
                tell(result, len(jobs))

    count = workers or len(os.sched_getaffinity(0))
    threads = [
        threading.Thread(target=_serve, args=(waiting, note), daemon=True)
        for _ in range(min(count, MOST_WORKERS, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def _serve(waiting: queue.SimpleQueue, note: Callable[[Done], None]) -> None:
    """Feed one worker until no job is left; one that dies is told of, and another takes its place."""
    worker = None
    try:
        while True:
            try:
                each = waiting.get_nowait()
            except queue.Empty:
                return
            worker = worker or _start()
            try:
                pickle.dump(each, worker.stdin)
                worker.stdin.flush()
                note(pickle.load(worker.stdout))
            except (EOFError, OSError):
                note(Done(each.kernel, 0.0, error=f"the compiling process ended with code {worker.wait()}"))
                worker = None
    finally:
        if worker is not None:
            worker.stdin.close()
            worker.wait()


def _start() -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


# In the worker ----------------------------------------------------------------------------------------------------


class NamesItsTarget:
    """A driver that compiles for a target and runs nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_one(each: Job) -> Done:
    """Compile a job's binary, or find it in the cache."""
    import triton

    hits = []
    triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
    triton.runtime.driver.set_active(NamesItsTarget(each.arch))
    begun = time.perf_counter()
    try:
        kernel = getattr(importlib.import_module(each.module), each.kernel)
        kernel.warmup(**each.values, **each.options, grid=(1,))
    except Exception as error:
        return Done(each.kernel, time.perf_counter() - begun, error=f"{type(error).__name__}: {str(error)[:300]}")
    return Done(each.kernel, time.perf_counter() - begun, cached=all(hits))


def main() -> None:
    """Answer jobs until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a compiler prints is no answer
    while True:
        try:
            each = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(compile_one(each), answers)
        answers.flush()


if __name__ == "__main__":
    # classes of this module, not of __main__, are what pickles name
    importlib.import_module("resnet_fused.backends.triton.compile").main()
