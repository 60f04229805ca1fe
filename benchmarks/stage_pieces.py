"""Time of evaluation by how many bytes a light stage's pieces have, each limit in fresh processes.

Run:  python benchmarks/stage_pieces.py [--model resnet18] [--batch 8] [--mib 0 3.25] [--processes 4] [--record FOLDER]

``NEAR`` in `convert/stage.py` was chosen by it. 0: light stages are run as others are. Processes take turns, since a
process's memory decides as much as the limit does: where its buffers came to lie, it keeps them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch

import resnet_fused
from resnet_fused.bench import named, runs
from resnet_fused.convert import stage


def measure(model: str, batch: int, mib: float, rounds: int) -> float:
    """The median of one process, in milliseconds."""
    stage.NEAR = stage.NEAR[0], 1 << 62, int(mib * (1 << 20))  # however large the whole is
    torch.manual_seed(0)
    fused = resnet_fused.fuse(named.build(model).eval().to(memory_format=torch.channels_last))
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    times = []
    with torch.no_grad():
        for _ in range(rounds + 4):
            begun = time.perf_counter()
            fused(x)
            times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times[4:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mib", type=float, nargs="+", default=[0, 3.25])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--here", type=float, help=argparse.SUPPRESS)
    runs.add_option(parser)
    options = parser.parse_args()
    if options.here is not None:
        print(measure(options.model, options.batch, options.here, options.rounds))
        return
    found: dict[float, list[float]] = {mib: [] for mib in options.mib}
    command = [sys.executable, "-W", "ignore", __file__, "--model", options.model, "--batch", str(options.batch)]
    for turn in range(options.processes):
        for mib in options.mib if turn % 2 == 0 else reversed(options.mib):
            done = subprocess.run([*command, "--here", str(mib)], capture_output=True, text=True, check=True)
            found[mib].append(float(done.stdout))
    with runs.printing("stage_pieces", options.record, model=options.model, dtype="f32", batch=options.batch):
        print("| MiB a piece | ms, median of processes | each |\n| --- | ---: | --- |")
        for mib, times in found.items():
            print(f"| {mib} | {statistics.median(times):.1f} | {', '.join(f'{t:.1f}' for t in times)} |")


if __name__ == "__main__":
    main()
