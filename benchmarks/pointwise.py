"""GFLOP/s of 1x1 convolutions and their gradients on this CPU: oneDNN's, ours, and plain matrix products.

Run:  python benchmarks/pointwise.py [--batch 1 4 16] [--rounds 7] [--record benchmarks/results]

The shapes of ResNet-50 at 224x224. `steps/conv.py` and `steps/own_product.py` choose by these figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from resnet_fused.backends import run
from resnet_fused.bench import runs
from resnet_fused.bench.timing import Rounds, clock_for, interleave
from resnet_fused.steps.conv import rows

#: input channels, output channels, size
SHAPES = ((64, 64, 56), (256, 64, 56), (64, 256, 56), (256, 128, 56), (512, 128, 28), (128, 512, 28),
          (1024, 256, 14), (256, 1024, 14), (1024, 512, 14), (2048, 512, 7), (512, 2048, 7))  # fmt: skip
aten = torch.ops.aten


def gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, both: bool = True) -> tuple:
    """oneDNN's gradients of the input and, with `both`, of the weight."""
    return aten.convolution_backward(
        grad, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, both, False]
    )


def contenders(batch: int, c: int, k: int, size: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> (how many products, what to run)."""

    def data(channels: int) -> torch.Tensor:
        return torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)

    x, grad, into, weight = data(c), data(k), data(c), torch.randn(k, c, 1, 1)
    matrix, g, ours = weight.view(k, c), rows(grad), (None, None, None, None, None, 0.0)

    def transposed() -> torch.Tensor:
        return weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)

    return {
        "forward, oneDNN": (1, lambda: torch.nn.functional.conv2d(x, weight)),
        "forward, product": (1, lambda: rows(x) @ matrix.T),
        "gradients, oneDNN": (2, lambda: gradients(grad, x, weight)),
        "gradients, products": (2, lambda: (g @ matrix, g.T @ rows(x))),
        "input's, oneDNN": (1, lambda: gradients(grad, x, weight, False)),
        "input's, ours": (1, lambda: run("conv_norm_add_relu", grad, transposed(), *ours)),
        "added, oneDNN": (1, lambda: run("conv_add_relu_", into, grad, weight.transpose(0, 1))),
        "added, ours": (1, lambda: run("conv_norm_add_relu_", into, grad, transposed(), *ours, adds=True)),
        "added, product": (1, lambda: rows(into).addmm_(g, matrix)),
    }


def row(batch: int, c: int, k: int, size: int, rounds: int) -> str:
    """One line of the table."""
    things = contenders(batch, c, k, size)
    calls = {name: lambda lap, call=call: (call(), lap("call")) for name, (_, call) in things.items()}
    times = interleave(calls, Rounds(rounds, rounds), clock_for(torch.device("cpu")))
    flops = 2 * batch * size * size * c * k
    rates = [f"{count * flops / times[name]['call'].median / 1e6:.0f}" for name, (count, _) in things.items()]
    return f"| {batch} | {c}, {k}, {size} | {' | '.join(rates)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=7)
    runs.add_option(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    names = list(contenders(1, 1, 1, 1))
    with runs.printing("pointwise", args.record, dtype="f32", layout="channels_last"):
        print("# 1x1 convolutions: oneDNN, ours and plain products\n")
        print(f"| batch | C, K, size | {' | '.join(names)} |")
        print(f"| ---: | --- | {' | '.join(['---:'] * len(names))} |")
        for batch in args.batch:
            for shape in SHAPES:
                print(row(batch, *shape, args.rounds), flush=True)
        print(f"\nGFLOP/s, medians of {args.rounds} interleaved runs. Gradients: of input and weight.")
        print("Input's: of the input alone, to a new tensor. Added: to what is there.")


if __name__ == "__main__":
    main()
