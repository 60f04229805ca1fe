"""Time of the host in evaluation by the compiled CUDA kernels: of one block more in a stage, with launches stubbed.

The ops of csrc/cuda, checks and allocations included, are compiled for the CPU (tests/cuda_on_cpu) so that they start
nothing: what is left is Python, PyTorch's dispatcher and allocator, and the host's code of the ops. What starting a
kernel takes in CUDA comes to it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import nn

import resnet_fused
from resnet_fused.convert import settled_stage
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.plan import lower_evaluation

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in ("tests/support", ".")]
FLAGS = ("-O2", "-DCUDA_ON_CPU_STARTS_NOTHING")
SIZE = (1, 256, 2, 2)  # small blocks of memory, which the C library has at hand, as a GPU's allocator has any
BLOCKS, REPEATS, CALLS = 8, 60, 20


def stage(kind: Callable[[], nn.Module], blocks: int) -> nn.Module:
    """So many identity blocks, convolutions in bfloat16 and norms in float32."""
    torch.manual_seed(0)
    made = nn.Sequential(*[kind() for _ in range(blocks)]).to(memory_format=torch.channels_last).eval()
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            module.bfloat16()
    return made


def microseconds(model: nn.Module) -> tuple[float, float]:
    """CPU time of a call: the median and the least of some repeats of some calls."""
    x = torch.randn(SIZE).bfloat16().contiguous(memory_format=torch.channels_last)
    found = []
    for repeat in range(3 + REPEATS):
        begun = time.process_time()
        for _ in range(CALLS):
            model(x)
        if repeat >= 3:
            found.append(1e6 * (time.process_time() - begun) / CALLS)
    return median(found), min(found)


def one_more(kind: Callable[[], nn.Module]) -> str:
    """CPU time of a block more, as two cells of a table."""
    one, more = (microseconds(resnet_fused.fuse(stage(kind, blocks))) for blocks in (1, BLOCKS))
    return " | ".join(f"{(b - a) / (BLOCKS - 1):.1f}" for a, b in zip(one, more, strict=True))


def measure() -> None:
    """Print the table."""
    import cuda_ops

    kinds = {"identity bottleneck": lambda: Bottleneck(256, 64), "identity basic block": lambda: BasicBlock(256, 256)}
    print("| evaluation, launches stubbed, one block more | us of the host, median | least |\n| --- | ---: | ---: |")
    with torch.no_grad(), cuda_ops.emulated(*FLAGS), resnet_fused.use("cuda"):
        for name, kind in kinds.items():
            print(f"| {name} | {one_more(kind)} |")
        with mock.patch.object(settled_stage, "settle", lambda *args: None):
            for name, kind in kinds.items():
                print(f"| {name}, each block asked for itself | {one_more(kind)} |")
            with mock.patch.object(lower_evaluation, "_in_one_call", lambda call, lowered, place: lowered):
                for name, kind in kinds.items():
                    print(f"| {name}, so too, and a call a convolution | {one_more(kind)} |")
