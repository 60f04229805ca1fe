"""Time the variants of ResNet-50's blocks on this CPU, and what memory costs them: page faults and system time.

    python benchmarks/block_variants.py [--batch 16] [--record benchmarks/results]

For each kind of block by itself, in training: stock, and fused with plain joins and with Gram joins, in turn, forward
and backward. plan/variants.py, plan/too_small.py, csrc/cpu/alloc.h and convert/stage.py quote it.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time

import torch

import resnet_fused
from resnet_fused.bench import runs
from resnet_fused.models import resnet50
from resnet_fused.plan import choose
from resnet_fused.plan import variants as plan

BLOCKS = {
    "layer1.1": (256, 56), "layer2.0": (256, 56), "layer2.1": (512, 28), "layer3.1": (1024, 14),
    "layer4.0": (1024, 14), "layer4.1": (2048, 7),
}  # fmt: skip
REPEATS = 15
#: What a Gram join may cost, so that the plan chooses it always, or never.
ALWAYS, NEVER = 1e9, -1e9


def step(block: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor, tolerated: float) -> dict[str, float]:
    """Milliseconds, page faults and system milliseconds of a forward and a backward."""
    kept, plan.TOLERATED = plan.TOLERATED, tolerated
    try:
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        block(x).backward(grad)
        taken, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    finally:
        plan.TOLERATED = kept
    system = 1e3 * (after.ru_stime - before.ru_stime)
    return {"ms": 1e3 * taken, "faults": after.ru_minflt - before.ru_minflt, "system ms": system}


def measure(
    name: str, batch: int, channels: int, size: int, model: torch.nn.Module, fused: torch.nn.Module
) -> list[str]:
    """Rows of the table for one block."""
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours = fused.get_submodule(name)
    variants = {"stock": (model.get_submodule(name), 0.0), "plain": (ours, NEVER), "Gram": (ours, ALWAYS)}
    grad = torch.randn_like(ours(x))
    samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(REPEATS):
        for variant, (block, tolerated) in variants.items():
            samples[variant].append(step(block, x, grad, tolerated))
    rows = []
    for variant, taken in samples.items():
        times = [one["ms"] for one in taken[2:]]
        low, *_, high = statistics.quantiles(times, n=10)
        faults, system = (statistics.median(one[key] for one in taken[2:]) for key in ("faults", "system ms"))
        figures = f"{statistics.median(times):.1f} ({low:.1f}-{high:.1f}) | {faults:.0f} | {system:.1f}"
        rows.append(f"| {name} [{batch}, {channels}, {size}, {size}] | {variant} | {figures} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    runs.add_option(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = resnet50().train().to(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(copy.deepcopy(model))
    with runs.printing("block_variants", args.record, dtype="f32", layout="channels_last"):
        print("| block | variant | ms (q10-q90) | page faults | system ms |\n| --- | --- | ---: | ---: | ---: |")
        for batch in args.batch:
            for name, (channels, size) in BLOCKS.items():
                with choose.fusing_all():
                    print("\n".join(measure(name, batch, channels, size, model, fused)), flush=True)
        print(f"\nMedians of {REPEATS - 2} steps, forward and backward, variants in turn.")


if __name__ == "__main__":
    main()
