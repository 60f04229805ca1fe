"""Time of grouped 3x3 convolutions and of both gradients: ours, oneDNN's, and how they compare.

Run:  python benchmarks/grouped.py [--batch 8] [--rounds 15] [--nets 32x4d regnet] [--record benchmarks/results]

`takes` and `takes_gradient` in `steps/grouped.py` choose by these figures, and its docstrings have them.
"""

from __future__ import annotations

import argparse

import torch

from resnet_fused.backends import backends
from resnet_fused.bench import runs
from resnet_fused.bench.timing import Rounds, clock_for, interleave
from resnet_fused.steps import Conv, grouped

Tensor = torch.Tensor
#: Channels of a ResNeXt-50 32x4d's grouped convolutions, columns of what each reads, stride.
STAGES = ((128, 56, 1), (256, 56, 2), (256, 28, 1), (512, 28, 2), (512, 14, 1), (1024, 14, 2), (1024, 7, 1))
TWICE = tuple((2 * channels, size, stride) for channels, size, stride in STAGES)


def grouped_by(groups: int, stages) -> list[tuple[int, int, int, int]]:
    """With the channels of a group."""
    return [(channels, size, stride, channels // groups) for channels, size, stride in stages]


NETS = {
    "32x4d": grouped_by(32, STAGES),
    "64x4d": grouped_by(64, TWICE),
    "32x8d": grouped_by(32, TWICE),
    "cifar-8x64d": grouped_by(8, ((512, 32, 1), (1024, 32, 2), (1024, 16, 1), (2048, 16, 2), (2048, 8, 1))),
    "regnet": [(64, 56, 1, 8), (64, 28, 1, 16), (48, 56, 1, 24), (192, 28, 1, 24), (336, 14, 1, 56), (224, 28, 1, 112)],
}


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def calls_of(x: Tensor, weight: Tensor, conv: Conv) -> dict[str, tuple]:
    """Name -> oneDNN's call and ours, each of the forward with statistics or of a gradient."""
    kernels, stride = backends()["cpu"].kernels, conv.stride[0]
    grad = torch.randn_like(torch.ops.aten.convolution(x, weight, None, *conv.args[:3], False, [0, 0], conv.groups))
    more = [size - (made - 1) * stride - 1 for size, made in zip(x.shape[2:], grad.shape[2:], strict=True)]
    convolve, wgrad = kernels["grouped_conv3x3"].run, kernels["grouped_conv3x3_wgrad"].run

    def stock(*mask: bool) -> tuple[Tensor, ...]:
        geometry = (*conv.args[:3], False, [0, 0], conv.groups)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)

    forward = torch.ops.aten.convolution
    return {
        "forward": (
            lambda: forward(x, weight, None, *conv.args[:3], False, [0, 0], conv.groups),
            lambda: convolve(x, weight, stride, False, True)[0],
        ),
        "gradient": (
            lambda: stock(True, False, False)[0],
            lambda: convolve(grad, weight, stride, True, False, more)[0],
        ),
        "weight": (lambda: stock(False, True, False)[1], lambda: wgrad(grad, x, weight, stride)),
    }


def measure(name: str, stock, ours, rounds: int) -> tuple[float, float]:
    """Milliseconds of both, interleaved, after checking that they agree."""
    expected = stock()
    if (ours() - expected).norm() > 1e-5 * expected.norm():
        raise SystemExit(f"{name} disagrees at {tuple(expected.shape)}")
    contenders = {key: lambda lap, call=call: (call(), lap("run")) for key, call in (("oneDNN", stock), ("ours", ours))}
    times = interleave(contenders, Rounds(at_least=rounds, at_most=rounds), clock_for(torch.device("cpu")))
    return times["oneDNN"]["total"].median, times["ours"]["total"].median


def row(batch: int, channels: int, size: int, stride: int, width: int, rounds: int) -> str:
    x, weight = channels_last(batch, channels, size, size), channels_last(channels, width, 3, 3) / (9 * width) ** 0.5
    conv = Conv((stride, stride), (1, 1), groups=channels // width)
    made = channels_last(batch, channels, (size - 1) // stride + 1, (size - 1) // stride + 1)
    taken = (
        grouped.takes(x, weight, conv, "cpu"),
        grouped.takes(made, weight, conv, "cpu", (size, size)),
        grouped.takes_gradient(made, x, weight, conv, "cpu"),
    )
    cells, flops = [], 2 * made[:, 0].numel() * weight.numel()
    for ours_taken, (name, calls) in zip(taken, calls_of(x, weight, conv).items(), strict=True):
        stock, ours = measure(name, *calls, rounds)
        ratio = f"{stock / ours:.2f}{'' if ours_taken else ' (not taken)'}"
        cells += [f"{stock:.2f}", f"{ours:.2f}", f"{flops / ours / 1e6:.0f}", ratio]
    return f"| {channels}, {size}, stride {stride} | {width} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=tuple(NETS))
    runs.add_option(parser)
    options = parser.parse_args()
    with runs.printing("grouped", options.record, dtype="f32", layout="channels_last", batch=options.batch):
        part = "oneDNN | ours | GFLOP/s | ratio"
        print(f"| channels, size | a group | forward: {part} | gradient: {part} | weight: {part} |")
        print("| --- | ---: |" + " ---: |" * 12)
        for net in options.nets:
            for case in NETS[net]:
                print(row(options.batch, *case, options.rounds), flush=True)
        print(f"\nms, medians of {options.rounds} interleaved runs; ours forward with batch statistics")


if __name__ == "__main__":
    main()
