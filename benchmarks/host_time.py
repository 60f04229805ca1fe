"""Time of the host in a training step planned for a GPU: Python and PyTorch around kernels that do not start.

Run:  OMP_NUM_THREADS=1 python benchmarks/host_time.py [--record benchmarks/results]

Triton's launches are stubbed, so a ResNet-50 of very narrow layers runs its GPU plan on CPU tensors with little else to
do than to be dispatched; eager, beside it, does all of its arithmetic. CPU time of one thread, the least of some steps.
What a launch takes in Triton itself comes to it. ``plan/devices.py`` assumes its HOST_SECONDS from this.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its ops then take CPU tensors

import torch
from torch import nn

import resnet_fused
from resnet_fused.backends.selfcheck import judge
from resnet_fused.backends.triton import common
from resnet_fused.bench import runs
from resnet_fused.models.resnet import Bottleneck, ResNet
from resnet_fused.plan import choose, devices

STEPS = 12
SIZE = (2, 3, 32, 32)


def narrow_model() -> nn.Module:
    """As many layers as ResNet-50, hardly any arithmetic."""
    torch.manual_seed(0)
    return ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=8).to(memory_format=torch.channels_last)


def milliseconds(model: nn.Module) -> float:
    """CPU time of a step."""
    x = torch.randn(SIZE).contiguous(memory_format=torch.channels_last)

    def step() -> float:
        begun = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.sum().backward()
        model.zero_grad()
        return 1e3 * (time.process_time() - begun)

    return min([step() for _ in range(3 + STEPS)][3:])


def stub() -> Callable[[], int]:
    """Start no kernel from now on, and check none; returns a function that tells how many would have been started."""
    started = []
    common.start = lambda kernel, *args, **meta: started.append(kernel)
    judge.doubt = judge.objection = lambda *args, **kwargs: ""
    return lambda: len(started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_option(parser)
    options = parser.parse_args()
    with runs.printing("host_time", options.record, dtype="bf16"):
        measure()


def measure() -> None:
    """Print the table."""
    eager = milliseconds(narrow_model())
    count, model = stub(), resnet_fused.fuse(narrow_model())
    with choose.planning_for(devices.find("h100")), resnet_fused.use("triton"):
        fused = milliseconds(model)
    counted = resnet_fused.explain(narrow_model(), SIZE, dtype=torch.bfloat16, device="h100").model
    print("| step with launches stubbed | ms of the host | kernels | us a kernel |\n| --- | ---: | ---: | ---: |")
    for name, taken, launches in (("fused", fused, counted.fused.launches), ("eager", eager, counted.stock.launches)):
        print(f"| {name} | {taken:.1f} | {launches} | {1e3 * taken / launches:.0f} |")
    print(f"\n{count() // (3 + STEPS)} kernels of Triton's a step were not started.")


if __name__ == "__main__":
    main()
