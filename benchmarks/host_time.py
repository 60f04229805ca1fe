"""Time of the host in a training step planned for a GPU: Python and PyTorch around kernels that do not start.

Of a whole ResNet-50, and of one identity bottleneck more in a stage, forward and backward apart.

Run:  OMP_NUM_THREADS=1 python benchmarks/host_time.py [--evaluation] [--record benchmarks/results]

Triton's launches are stubbed, so a ResNet-50 of very narrow layers runs its GPU plan on CPU tensors with little else to
do than to be dispatched; eager, beside it, does all of its arithmetic. Of what the bottleneck's 3x3 convolution takes,
which stays ATen's, its arithmetic is told apart: on a GPU that is no time of the host. CPU time of one thread, the
least of some steps.
What a launch takes in Triton itself comes to it. ``plan/devices.py`` assumes its HOST_SECONDS from this.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its ops then take CPU tensors

import host_evaluation
import torch
from torch import nn

import resnet_fused
from resnet_fused.backends.selfcheck import judge
from resnet_fused.backends.triton import common
from resnet_fused.bench import runs
from resnet_fused.models.resnet import Bottleneck, ResNet
from resnet_fused.plan import choose, devices

aten = torch.ops.aten
STEPS = 12
BLOCK_STEPS = 300
SIZE = (2, 3, 32, 32)
BLOCK_SIZE = (2, 256, 8, 8)
BLOCKS = 4  # in the longer of the two stages, of which the other has one


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


def one_more(make: Callable[[int], nn.Module]) -> list[float]:
    """CPU time of one block more in a stage that `make` makes of so many, forward and backward."""
    one, more = (stage_milliseconds(make(blocks)) for blocks in (1, BLOCKS))
    return [(b - a) / (BLOCKS - 1) for a, b in zip(one, more, strict=True)]


def stage_milliseconds(block: nn.Module) -> tuple[float, float]:
    """CPU time of the forward and of the backward of a stage within a model: its input wants a gradient."""
    x = torch.randn(BLOCK_SIZE).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(BLOCK_SIZE).bfloat16().contiguous(memory_format=torch.channels_last)

    def step() -> tuple[float, float]:
        begun = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        between = time.process_time()
        out.backward(grad)
        done = time.process_time()
        block.zero_grad()
        x.grad = None
        return 1e3 * (between - begun), 1e3 * (done - between)

    forward, backward = zip(*[step() for _ in range(3 + BLOCK_STEPS)][3:], strict=True)
    return min(forward), min(backward)


def stub() -> Callable[[], int]:
    """Start no kernel from now on, and check none; returns a function that tells how many would have been started."""
    started = []
    common.start = lambda kernel, *args, **meta: started.append(kernel)
    judge.doubt = judge.objection = lambda *args, **kwargs: ""
    return lambda: len(started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_option(parser)
    parser.add_argument("--evaluation", action="store_true", help="of evaluation by the compiled kernels")
    options = parser.parse_args()
    with runs.printing("host_time", options.record, dtype="bf16"):
        host_evaluation.measure() if options.evaluation else measure()


def stage(blocks: int) -> nn.Module:
    """So many identity bottlenecks of ResNet-50's first stage."""
    torch.manual_seed(0)
    return nn.Sequential(*[Bottleneck(256, 64) for _ in range(blocks)]).to(memory_format=torch.channels_last)


def arithmetic() -> list[float]:
    """What ATen's 3x3 convolution of a bottleneck takes longer than one of a pixel, forward and backward."""

    def taken(*pixels: int) -> list[float]:
        x = torch.randn(BLOCK_SIZE[0], 64, *pixels).bfloat16().contiguous(memory_format=torch.channels_last)
        weight = torch.randn(64, 64, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
        geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        calls = (
            lambda: aten.convolution.default(x, weight, None, *geometry),
            lambda: aten.convolution_backward.default(x, x, weight, None, *geometry, [True, True, False]),
        )
        return [min(_timed(call) for _ in range(BLOCK_STEPS)) for call in calls]

    return [all_of_it - of_one for all_of_it, of_one in zip(taken(*BLOCK_SIZE[2:]), taken(1, 1), strict=True)]


def _timed(call: Callable) -> float:
    begun = time.process_time()
    call()
    return 1e3 * (time.process_time() - begun)


def measure() -> None:
    """Print the tables."""
    eager, eager_block, convolution = milliseconds(narrow_model()), one_more(stage), arithmetic()
    count, model = stub(), resnet_fused.fuse(narrow_model())
    with choose.planning_for(devices.find("h100")), resnet_fused.use("triton"):
        fused = milliseconds(model)
        triton = count()
        fused_block = one_more(lambda blocks: resnet_fused.fuse(stage(blocks)))
    counted = resnet_fused.explain(narrow_model(), SIZE, dtype=torch.bfloat16, device="h100").model
    print("| step with launches stubbed | ms of the host | kernels | us a kernel |\n| --- | ---: | ---: | ---: |")
    for name, taken, launches in (("fused", fused, counted.fused.launches), ("eager", eager, counted.stock.launches)):
        print(f"| {name} | {taken:.1f} | {launches} | {1e3 * taken / launches:.0f} |")
    print(f"\n{triton // (3 + STEPS)} kernels of Triton's a step were not started.\n")
    print_block(fused_block, eager_block, convolution)


def print_block(fused: list[float], eager: list[float], convolution: list[float]) -> None:
    """The table of one identity bottleneck more.

    Its launches are counted behind a convolution: its input wants a gradient. Casts of autocast's are in the times and
    not among the launches.
    """
    behind = nn.Sequential(nn.Conv2d(256, 256, 1), *stage(1)).to(memory_format=torch.channels_last)
    counted = resnet_fused.explain(behind, BLOCK_SIZE, dtype=torch.bfloat16, device="h100").blocks[0]
    print("| identity bottleneck more | ms forward | ms backward | kernels |\n| --- | ---: | ---: | ---: |")
    for name, taken, launches in (("fused", fused, counted.fused.launches), ("eager", eager, counted.stock.launches)):
        print(f"| {name} | {taken[0]:.3f} | {taken[1]:.3f} | {launches} |")
    without = [all_of_it - of_it for all_of_it, of_it in zip(fused, convolution, strict=True)]
    print(f"| fused, but for the arithmetic of its 3x3 convolution | {without[0]:.3f} | {without[1]:.3f} | |")


if __name__ == "__main__":
    main()
