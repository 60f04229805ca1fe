"""Time of a dense layer's four passes on one buffer against stock's, as DenseNet-121 has them, on a CPU.

Run:  python benchmarks/dense_block.py [--batch 8] [--rounds 9] [--record benchmarks/results]

Stock: batch norm, ReLU and convolution twice, and their backward by autograd, of an input that is a tensor of its own;
without the concatenation that makes it, and without what adds up its gradients. Ours reads and writes channels of the
block's buffer, and the backward adds to what has gathered there. Results are compared before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

from resnet_fused.backends import run
from resnet_fused.bench import runs
from resnet_fused.bench.timing import Rounds, clock_for, interleave
from resnet_fused.ops.contract import channels_last

Tensor = torch.Tensor
GROWTH, MIDDLE, EPS = 32, 128, 1e-5
#: Size, input channels of a layer, channels of the block: the first and the last layer of each block.
LAYERS = ((56, 64, 256), (56, 224, 256), (28, 128, 512), (28, 480, 512), (14, 256, 1024), (14, 992, 1024))
LAYERS += ((7, 512, 1024), (7, 992, 1024))


class Layer:
    """A layer's values; each pass leaves what the next ones read."""

    def __init__(self, batch: int, size: int, channels: int, width: int) -> None:
        self.channels = channels
        self.buffer, self.gathered = (channels_last(torch.randn(batch, width, size, size)) for _ in range(2))
        self.w1 = torch.randn(MIDDLE, channels, 1, 1) / channels**0.5
        self.w2 = torch.randn(GROWTH, MIDDLE, 3, 3) / (3 * MIDDLE**0.5)
        self.gamma1, self.beta1 = torch.rand(channels) + 0.5, torch.randn(channels)
        self.gamma2, self.beta2 = torch.rand(MIDDLE) + 0.5, torch.randn(MIDDLE)
        self.x = self.buffer[:, :channels]
        self.slice, self.at_slice = (t[:, channels : channels + GROWTH] for t in (self.buffer, self.gathered))
        self.zeros = torch.zeros(GROWTH)
        self.mean1, m2, *_ = run("bn_stats", channels_last(self.x.contiguous()), backend="cpu")
        _, self.rstd1, self.scale1, self.shift1, _ = self.affine(self.mean1, m2, self.gamma1, self.beta1, self.x)
        self.added = channels_last(torch.zeros_like(self.gathered))  # not what is gathered, which would grow
        self.stock_x = channels_last(self.x.contiguous())
        self.grad = channels_last(self.at_slice.contiguous())
        self.parameters = [p.clone().requires_grad_() for p in (self.stock_x, self.w1, self.w2)]
        self.parameters += [p.requires_grad_() for p in (self.gamma1.clone(), self.beta1.clone())]
        self.parameters += [p.requires_grad_() for p in (self.gamma2.clone(), self.beta2.clone())]

    @staticmethod
    def affine(mean: Tensor, m2: Tensor, gamma: Tensor, beta: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        return run("bn_affine", mean, m2, gamma, beta, like, EPS, backend="cpu")

    def forward(self) -> Tensor:
        self.z, self.mean2, m2 = run("dense_conv1x1", self.x, self.w1, self.scale1, self.shift1, backend="cpu")
        _, self.rstd2, self.scale2, self.shift2, _ = self.affine(self.mean2, m2, self.gamma2, self.beta2, self.z)
        run("dense_conv3x3", self.z, self.w2, self.scale2, self.shift2, self.slice, backend="cpu")
        return self.slice

    def backward(self) -> Tensor:
        second = (self.z, self.w2, self.scale2, self.shift2, self.mean2)
        gradient = (self.at_slice, self.slice, self.zeros, self.zeros)
        g, sum_g, sum_gz, self.grad_w2 = run("dense_conv3x3_backward", *gradient, *second, backend="cpu")
        sums = (sum_g, sum_gz, self.mean2, self.rstd2, self.scale2, self.z)
        b, d, _ = run("bn_coefficients", *sums, backend="cpu")
        first = (self.x, self.w1, self.scale1, self.shift1, self.mean1)
        out = self.added[:, : self.channels]
        lazy = (g, self.z, self.scale2, b, d)
        return run("dense_conv1x1_backward", out, None, *lazy, *first, backend="cpu")[2]

    def stock_forward(self) -> Tensor:
        x, w1, w2, gamma1, beta1, gamma2, beta2 = self.parameters
        z = F.conv2d(F.batch_norm(x, None, None, gamma1, beta1, True, eps=EPS).relu_(), w1)
        self.y = F.conv2d(F.batch_norm(z, None, None, gamma2, beta2, True, eps=EPS).relu_(), w2, padding=1)
        return self.y.detach()

    def stock_backward(self) -> Tensor:
        return torch.autograd.grad(self.y, self.parameters, self.grad, retain_graph=True)[1]


def measure(layer: Layer, rounds: int) -> dict[str, float]:
    """Milliseconds of each pass, after checking that they agree."""
    passes: dict[str, Callable[[], Tensor]] = {
        "forward": layer.forward,
        "stock forward": layer.stock_forward,
        "backward": layer.backward,
        "stock backward": layer.stock_backward,
    }
    results = {name: call() for name, call in passes.items()}
    for name in ("forward", "backward"):
        ours, expected = results[name], results[f"stock {name}"]
        if (ours - expected).norm() > 1e-2 * expected.norm():  # a sign that rounding turns opens a gate in one alone
            raise SystemExit(f"{name} passes of {layer.channels} channels disagree")
    contenders = {name: lambda lap, call=call: (call(), lap("run")) for name, call in passes.items()}
    times = interleave(contenders, Rounds(at_least=rounds, at_most=rounds), clock_for(torch.device("cpu")))
    return {name: times[name]["total"].median for name in passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    runs.add_option(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    with runs.printing("dense_block", options.record, dtype="f32", layout="channels_last", batch=options.batch):
        print("| size, channels | forward | stock | times as fast | backward | stock | times as fast |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for size, channels, width in LAYERS:
            found = measure(Layer(options.batch, size, channels, width), options.rounds)
            cells = []
            for name in ("forward", "backward"):
                ours, stock = found[name], found[f"stock {name}"]
                cells += [f"{ours:.2f}", f"{stock:.2f}", f"{stock / ours:.2f}"]
            print(f"| {size}, {channels} | {' | '.join(cells)} |", flush=True)
        print(f"\nms, medians of {options.rounds} interleaved runs")


if __name__ == "__main__":
    main()
