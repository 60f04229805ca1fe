"""Times from fresh processes: one contender each, in turn, under both settings of the C library's allocator.

Interleaved times share a heap: what one contender leaves there, the next finds, and stock's training step takes half as
long again or not by the page faults that this saves it. A process of its own knows nothing of the other contender. By
default glibc maps every block of 32 MiB or more anew and gives it back when it is freed; with :data:`KEPT` it keeps
them, which many users set (or an allocator that does so). Both are measured, pairs of processes one after the other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable

import numpy
import torch

from . import equality, named, peers, photos, records
from .errors import Refused
from .timing import Rounds, clock_for, interleave

#: glibc's setting under which freed memory stays with the process.
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
ALLOCATORS = {"default allocator": {}, "allocator keeps memory": KEPT}
#: Seconds after which a process is given up.
LIMIT = 900


def measure(options, plan, device: torch.device, pairs: int, progress: Callable[[float], None]) -> list[records.Row]:
    """Rows of stock and ours: the median over processes of each one's median.

    Their quantiles and the ratio's bounds are the smallest and the largest of `pairs` processes or pairs.

    Raises:
        Refused: a process failed; the text is its own.
    """
    rows, done, total = [], 0, pairs * len(ALLOCATORS) * 2
    for allocator, environment in ALLOCATORS.items():
        found: dict[str, dict[str, list[float]]] = {peers.STOCK: {}, peers.OURS: {}}
        for index in range(pairs):
            for peer in list(found) if index % 2 == 0 else reversed(found):
                for name, median in _process(options, plan, device, peer, environment).items():
                    found[peer].setdefault(name, []).append(median)
                done += 1
                progress(done / total)
        for name, stock in found[peers.STOCK].items():
            rows += _rows(f"{name}, fresh processes, {allocator}", stock, found[peers.OURS][name])
    return rows


def _rows(name: str, stock: list[float], ours: list[float]) -> list[records.Row]:
    measured = {
        peer: (float(numpy.median(times)), min(times), max(times), len(times))
        for peer, times in ((peers.STOCK, stock), (peers.OURS, ours))
    }
    ratios = [a / b for a, b in zip(stock, ours, strict=True)]
    return records.rows_of(name, "ms", measured, {peers.OURS: (min(ratios), max(ratios))})


def _process(options, plan, device: torch.device, peer: str, environment: dict[str, str]) -> dict[str, float]:
    """The medians that one contender measures in a process of its own."""
    task = {"peer": peer, "device": str(device), "options": dataclasses.asdict(options)}
    task |= {
        "batch": plan.batch,
        "size": plan.size,
        "eval_batches": plan.eval_batches,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(task)]
    try:
        ended = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise Refused(f"a process of {peer} took more than {LIMIT} s") from error
    except subprocess.CalledProcessError as error:
        raise Refused(
            f"a process of {peer} failed: {(error.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        ) from error
    return json.loads(ended.stdout.splitlines()[-1])


def _measure_here(task: dict) -> dict[str, float]:
    """What the process does: the contender alone, training first, as a training run would begin."""
    from .options import Options, plan_for
    from .run import Bench

    torch.set_num_threads(task["threads"])
    options = Options(**task["options"])
    device = torch.device(task["device"])
    torch.manual_seed(0)
    model = named.build(options.model)
    equality.scatter_norms(model)
    model = peers.load(task["peer"]).prepare(model.to(device, memory_format=torch.channels_last))
    quick, clock = options.quick, clock_for(device)
    bench = Bench(options, plan_for(options, model), device, {}, None, None)

    def median(run: Callable, rounds: Rounds) -> float:
        return interleave({"": run}, rounds, clock)[""]["total"].median

    found = {}
    x = photos.batches(1, task["batch"], task["size"])[0].to(device)
    rounds = Rounds(2, 3) if quick else Rounds(5, 30, 5.0, warmup=2)
    found[f"training step, batch {task['batch']}"] = median(bench.step(model.train(), x), rounds)
    for batch in task["eval_batches"]:
        x = photos.batches(1, batch, task["size"])[0].to(device)
        rounds = Rounds(2, 3) if quick else Rounds(5, 50, 3.0, warmup=2)
        found[f"evaluation, batch {batch}"] = median(bench.evaluate(model.eval(), x), rounds)
    return found


if __name__ == "__main__":
    print(json.dumps(_measure_here(json.loads(sys.argv[1]))))
