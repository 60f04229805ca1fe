"""GFLOP/s of a convolution's weight gradient: ours, oneDNN's, for 1x1 a plain matrix product, for 3x3 Winograd's.

Run:  python benchmarks/weight_grad.py [--batch 16] [--rounds 5] [--record benchmarks/results]

The shapes of ResNet-50 at 224x224, some of ResNets for CIFAR, and two kernels of 5x5. `steps/conv.py`
and `steps/winograd_wgrad.py` choose by these figures. GFLOP/s are those of a direct sum, whatever fewer an algorithm
gets by with.
"""

from __future__ import annotations

import argparse

import torch

from resnet_fused.backends import backends
from resnet_fused.bench import runs
from resnet_fused.bench.timing import Rounds, clock_for, interleave
from resnet_fused.ops import OPS

CANDIDATES = ("ours", "oneDNN", "matrix product", "Winograd")
#: input channels, output channels, kernel, stride, input size
SHAPES = (
    (64, 64, 1, 1, 56),
    (64, 64, 3, 1, 56),
    (64, 256, 1, 1, 56),
    (256, 64, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (128, 512, 1, 1, 28),
    (128, 128, 3, 1, 28),
    (256, 256, 3, 2, 28),
    (256, 1024, 1, 1, 14),
    (256, 256, 3, 1, 14),
    (512, 512, 3, 2, 14),
    (512, 2048, 1, 1, 7),
    (512, 512, 3, 1, 7),
    (16, 16, 3, 1, 32),
    (16, 32, 3, 2, 32),
    (32, 64, 3, 2, 16),
    (24, 24, 3, 1, 28),
    (32, 32, 5, 1, 28),
    (64, 64, 5, 1, 28),
)


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def measure(batch: int, shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """GFLOP/s by candidate, after checking that all agree."""
    inputs, outputs, kernel, stride, size = shape
    x, weight = channels_last(batch, inputs, size, size), channels_last(outputs, inputs, kernel, kernel)
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1])
    grad = torch.randn_like(torch.conv2d(x, weight, None, stride, kernel // 2))
    op = OPS["conv_weight_grad"]
    calls = {
        "ours": lambda: backends()["cpu"].kernels["conv_weight_grad"].run(grad, x, weight, *geometry),
        "oneDNN": lambda: op.reference(grad, x, weight, *geometry),
    }
    if kernel == 1 and stride == 1:
        calls["matrix product"] = lambda: (rows(grad).T @ rows(x)).view_as(weight)
    if kernel == 3 and stride == 1:
        calls["Winograd"] = lambda: backends()["cpu"].kernels["winograd_conv3x3_wgrad"].run(grad, x, weight, (1, 1))
    expected = op.reference(grad.double(), x.double(), weight.double(), *geometry)
    for name, call in calls.items():
        if (call() - expected).norm() > 1e-5 * expected.norm():
            raise SystemExit(f"{name} disagrees at {shape}")
    contenders = {name: lambda lap, call=call: (call(), lap("run")) for name, call in calls.items()}
    times = interleave(contenders, Rounds(at_least=rounds, at_most=rounds), clock_for(torch.device("cpu")))
    flops = op.flops(grad, x, weight, *geometry)
    return {name: flops / (laps["total"].median * 1e6) for name, laps in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    runs.add_option(parser)
    options = parser.parse_args()
    with runs.printing("weight_grad", options.record, dtype="f32", layout="channels_last", batch=options.batch):
        print(f"| C, K, kernel, stride, size | {' | '.join(CANDIDATES)} |\n| --- |{' ---: |' * len(CANDIDATES)}")
        for shape in SHAPES:
            found = measure(options.batch, shape, options.rounds)
            cells = [f"{found[name]:.0f}" if name in found else "" for name in CANDIDATES]
            print(f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)
        print(f"\nGFLOP/s, medians of {options.rounds} interleaved runs")


if __name__ == "__main__":
    main()
