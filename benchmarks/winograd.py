"""Time of 3x3 convolutions and of their input's gradient: ours by minimal filtering, oneDNN's, and how they compare.

Run:  python benchmarks/winograd.py [--batch 8] [--rounds 9] [--channels 64 128] [--record benchmarks/results]

`saved_products` in `steps/winograd.py` chooses by these figures, on one thread (OMP_NUM_THREADS=1), and its docstring
has their extremes at batch 1, 2, 4 and 8.
"""

from __future__ import annotations

import argparse

import torch

from resnet_fused.backends import backends
from resnet_fused.bench import runs
from resnet_fused.bench.timing import Rounds, clock_for, interleave
from resnet_fused.ops import OPS
from resnet_fused.steps import Conv, winograd

CHANNELS, SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 256, 512), (4, 7, 14, 28, 56)
MOST_FLOPS = 2e9  # of a convolution that is measured


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def measure(x: torch.Tensor, weight: torch.Tensor, transposed: bool, rounds: int) -> tuple[float, float]:
    """Milliseconds, ours and oneDNN's, after checking that both agree."""
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def stock() -> torch.Tensor:
        if transposed:
            return torch.ops.aten.convolution_backward(x, x, weight, None, *geometry, [True, False, False])[0]
        return torch.ops.aten.convolution(x, weight, None, *geometry)

    calls = {
        "ours": lambda: backends()["cpu"].kernels["winograd_conv3x3"].run(x, weight, 1, transposed)[0],
        "oneDNN": stock,
    }
    expected = OPS["winograd_conv3x3"].reference(x.double(), weight.double(), 1, transposed)[0]
    for name, call in calls.items():
        if (call() - expected).norm() > 1e-5 * expected.norm():
            raise SystemExit(f"{name} disagrees at {tuple(x.shape)}")
    contenders = {name: lambda lap, call=call: (call(), lap("run")) for name, call in calls.items()}
    times = interleave(contenders, Rounds(at_least=rounds, at_most=rounds), clock_for(torch.device("cpu")))
    return tuple(times[name]["total"].median for name in ("ours", "oneDNN"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    runs.add_option(parser)
    options = parser.parse_args()
    with runs.printing("winograd", options.record, dtype="f32", layout="channels_last", batch=options.batch):
        print("| channels, size | ours | oneDNN | ratio | gradient | oneDNN | ratio | taken |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
        for channels in options.channels:
            for size in SIZES:
                x, weight = channels_last(options.batch, channels, size, size), channels_last(channels, channels, 3, 3)
                if OPS["winograd_conv3x3"].flops(x, weight) > MOST_FLOPS:
                    continue
                cells = []
                for transposed in (False, True):
                    ours, stock = measure(x, weight, transposed, options.rounds)
                    cells += [f"{ours:.3f}", f"{stock:.3f}", f"{stock / ours:.2f}"]
                taken = "yes" if winograd.saved_products(x.shape, weight, Conv(padding=(1, 1))) else "no"
                print(f"| {channels}, {size} | {' | '.join(cells)} | {taken} |", flush=True)
        print(f"\nms, medians of {options.rounds} interleaved runs")


if __name__ == "__main__":
    main()
