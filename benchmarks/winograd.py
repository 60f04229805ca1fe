"""Time of 3x3 convolutions and of their input's gradient: ours by minimal filtering, oneDNN's, and how they compare.

Run:  python benchmarks/winograd.py [--batch 8] [--rounds 9] [--channels 64 128] [--record benchmarks/results]
      python benchmarks/winograd.py --evaluation ...

`--evaluation`: with weights that are kept, transformed and packed, and shift, sum and ReLU behind the convolution; by
F(2x2) and F(4x4). With what share of its products' time at the peak each takes, and of `--peak` products a nanosecond.

`saved_products` in `steps/winograd.py` chooses by these figures, on one thread (OMP_NUM_THREADS=1), and its docstring
has their extremes at batch 1, 2, 4 and 8.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch

from resnet_fused.backends import backends, onednn
from resnet_fused.bench import runs
from resnet_fused.bench.timing import Rounds, clock_for, interleave
from resnet_fused.ops import OPS
from resnet_fused.steps import Conv, winograd

CHANNELS, SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 256, 512), (4, 7, 14, 28, 56)
MOST_FLOPS = 2e9  # of a convolution that is measured


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def timed(calls: dict[str, Callable[[], torch.Tensor]], expected: torch.Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of each call, interleaved, after checking that all agree."""
    for name, call in calls.items():
        if (call() - expected).norm() > 1e-5 * expected.norm():
            raise SystemExit(f"{name} disagrees at {tuple(expected.shape)}")
    contenders = {name: lambda lap, call=call: (call(), lap("run")) for name, call in calls.items()}
    times = interleave(contenders, Rounds(at_least=rounds, at_most=rounds), clock_for(torch.device("cpu")))
    return {name: times[name]["total"].median for name in calls}


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
    times = timed(calls, expected, rounds)
    return times["ours"], times["oneDNN"]


def measure_evaluation(x: torch.Tensor, weight: torch.Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of a convolution with all behind it, by tiles of 2 and of 4 outputs to a side and by oneDNN."""
    kernels, shift = backends()["cpu"].kernels, torch.randn(weight.shape[0])
    residual, same = torch.randn_like(x), Conv(padding=(1, 1))
    packed = onednn.prepack(weight, x.shape, *same.args)
    run, calls = kernels["winograd_conv3x3_add_relu"].run, {}
    for outputs in (2, 4):
        transformed = kernels["winograd_weight3x3"].run(weight, None, outputs)
        calls[f"F{outputs}"] = lambda t=transformed: run(x, weight, t, None, shift, residual, 1, True)
    calls["oneDNN"] = lambda: onednn.conv_packed(x, packed, shift, same, True, 1.0, residual)
    wide = (t.double() for t in (x, weight, weight, weight.new_ones(weight.shape[0]), shift, residual))
    return timed(calls, OPS["winograd_conv3x3_add_relu"].reference(*wide, 1, True), rounds)


def of_peak(x: torch.Tensor, outputs: int, milliseconds: float, peak: float) -> float:
    """The share of a call's time that its products take at the peak. `peak`: of all threads, products a nanosecond."""
    n, c, h, w = x.shape
    products = n * -(-h // outputs) * -(-w // outputs) * (outputs + 2) ** 2 * c * -(-c // 32) * 32
    return products / peak / (1e6 * milliseconds)


def evaluation_rows(options: argparse.Namespace) -> None:
    print("| channels, size | F2 | F4 | oneDNN | ratio F2 | ratio F4 | of peak | | default | fast |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    for x, weight in shapes(options):
        times = measure_evaluation(x, weight, options.rounds)
        cells = [f"{times[name]:.3f}" for name in ("F2", "F4", "oneDNN")]
        cells += [f"{times['oneDNN'] / times[name]:.2f}" for name in ("F2", "F4")]
        cells += [f"{of_peak(x, tile, times[f'F{tile}'], options.peak):.0%}" for tile in (2, 4)]
        for precision in ("default", "fast"):
            where = Conv(padding=(1, 1)), precision, torch.get_num_threads()
            cells.append({0: "oneDNN", 2: "F2", 4: "F4"}[winograd.folded(x.shape, weight, *where)[0]])
        print(f"| {x.shape[1]}, {x.shape[2]} | {' | '.join(cells)} |", flush=True)


def training_rows(options: argparse.Namespace) -> None:
    print("| channels, size | ours | oneDNN | ratio | gradient | oneDNN | ratio | taken |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for x, weight in shapes(options):
        cells = []
        for transposed in (False, True):
            ours, stock = measure(x, weight, transposed, options.rounds)
            cells += [f"{ours:.3f}", f"{stock:.3f}", f"{stock / ours:.2f}"]
        taken = "yes" if winograd.saved_products(x.shape, weight, Conv(padding=(1, 1))) else "no"
        print(f"| {x.shape[1]}, {x.shape[2]} | {' | '.join(cells)} | {taken} |", flush=True)


def shapes(options: argparse.Namespace) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and weights to measure."""
    for channels, size in itertools.product(options.channels, SIZES):
        x, weight = channels_last(options.batch, channels, size, size), channels_last(channels, channels, 3, 3)
        if OPS["winograd_conv3x3"].flops(x, weight) <= MOST_FLOPS:
            yield x, weight / (9 * channels) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--evaluation", action="store_true")
    parser.add_argument("--peak", type=float, default=125.0, help="products a nanosecond of all threads")
    runs.add_option(parser)
    options = parser.parse_args()
    name = "winograd_evaluation" if options.evaluation else "winograd"
    with runs.printing(name, options.record, dtype="f32", layout="channels_last", batch=options.batch):
        (evaluation_rows if options.evaluation else training_rows)(options)
        print(f"\nms, medians of {options.rounds} interleaved runs")


if __name__ == "__main__":
    main()
