"""Time of 1x1 convolutions on values against the way on tensors, as ResNet-50's bottlenecks have them, on a CPU.

Run:  python benchmarks/conv1x1.py [--batch 16] [--rounds 9] [--record benchmarks/results]

Forward: normalise on load, convolve and sum the statistics, against a pass that writes the activation, ATen's
convolution and a pass for the statistics. Backward: both gradients, the masks and the sums for batch norm, against the
passes of `steps/join.py` and `steps/kinds.py` and ATen's two gradients. Results of both are compared before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from resnet_fused.backends import run
from resnet_fused.bench import runs
from resnet_fused.bench.timing import Rounds, clock_for, interleave
from resnet_fused.ops.contract import channels_last, pack_mask
from resnet_fused.steps import Conv, conv

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))  # inner channels, size; the outer are four times as many
Tensor = torch.Tensor


class Problem:
    """A 1x1 convolution with what surrounds it."""

    def __init__(self, batch: int, inputs: int, outputs: int, size: int) -> None:
        def activations(channels: int) -> Tensor:
            return channels_last(torch.randn(batch, channels, size, size))

        self.x, self.z, self.g = activations(inputs), activations(outputs), activations(outputs)
        self.weight = torch.randn(outputs, inputs, 1, 1) / inputs**0.5
        self.x_scale, self.x_shift, self.x_mean = torch.rand(inputs) + 0.5, torch.randn(inputs), torch.randn(inputs)
        self.a, self.b, self.d, self.mean = (0.1 * torch.randn(outputs) for _ in range(4))
        self.out, self.residual = activations(outputs), activations(inputs)
        self.mask = pack_mask(self.out > 0)

    def convolved(self, x: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, self.weight, None, *GEOMETRY)

    def forward_on_values(self) -> Tensor:
        arguments = (self.x, self.weight, self.x_scale, self.x_shift)
        return run("conv1x1", *arguments, eps=1e-5, backend="cpu")[0]

    def forward_on_tensors(self) -> Tensor:
        z = self.convolved(run("norm_add_relu", self.x, self.x_scale, self.x_shift, backend="cpu")[0])
        run("bn_stats", z, eps=1e-5, backend="cpu")
        return z

    def last_on_values(self) -> Tensor:
        """The gradients of the convolution that a join ends; the sums of the last one made."""
        run("norm_add_relu_backward", self.g, z=self.z, mean=self.mean, mask=self.mask, emit_grad=False, backend="cpu")
        options = {"mask": self.mask, "z": self.z, "a": self.a, "b": self.b, "d": self.d, "x": self.x}
        options |= {"x_scale": self.x_scale, "x_shift": self.x_shift, "x_mean": self.x_mean, "x_rstd": self.x_scale}
        return run("conv1x1_dgrad", self.g, self.weight, **options, weight_grad=True, backend="cpu")[1]

    def last_on_tensors(self) -> Tensor:
        options = {"z": self.z, "mean": self.mean, "mask": self.out}
        masked, *_ = run("norm_add_relu_backward", self.g, **options, backend="cpu")
        run("lazy_grad_apply_", masked, self.z, self.a, self.b, self.d, backend="cpu")
        activation, _ = run("norm_add_relu", self.x, self.x_scale, self.x_shift, backend="cpu")
        grad_x, _ = conv.gradients(masked, activation, self.weight, Conv(), "cpu")
        before = (self.x_mean, self.x_scale, self.x_scale, self.x_shift)
        return run("norm_relu_coefficients", grad_x, self.x, *before, backend="cpu")[0]

    def first_on_values(self) -> Tensor:
        """The gradients of the convolution that reads the block's input, and that of the identity path added."""
        options = {"z": self.z, "a": self.a, "b": self.b, "d": self.d, "x": self.x, "residual": self.residual}
        return run("conv1x1_dgrad", self.g, self.weight, **options, weight_grad=True, backend="cpu")[0]

    def first_on_tensors(self) -> Tensor:
        dz = run("lazy_grad_apply", self.g, self.z, self.a, self.b, self.d, backend="cpu")
        return conv.gradients(dz, self.x, self.weight, Conv(), "cpu", add_to=self.residual.clone())[0]


GEOMETRY = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def measure(values: Callable[[], Tensor], tensors: Callable[[], Tensor], rounds: int) -> tuple[float, float]:
    """Milliseconds on values and on tensors, after checking that both agree."""
    ours, expected = values(), tensors()
    if (ours - expected).norm() > 1e-4 * expected.norm():
        raise SystemExit(f"results of shape {tuple(ours.shape)} disagree")
    calls = {"values": values, "tensors": tensors}
    contenders = {name: lambda lap, call=call: (call(), lap("run")) for name, call in calls.items()}
    times = interleave(contenders, Rounds(at_least=rounds, at_most=rounds), clock_for(torch.device("cpu")))
    return tuple(times[name]["total"].median for name in calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    runs.add_option(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    with runs.printing("conv1x1", options.record, dtype="f32", layout="channels_last", batch=options.batch):
        print("| channels, size | forward | tensors | ratio | backward | tensors | ratio |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for inner, size in SHAPES:
            for inputs, outputs in ((4 * inner, inner), (inner, 4 * inner)):
                p = Problem(options.batch, inputs, outputs, size)
                first = (p.first_on_values, p.first_on_tensors)
                pairs = (
                    (p.forward_on_values, p.forward_on_tensors),
                    first if inputs > outputs else (p.last_on_values, p.last_on_tensors),
                )
                cells = []
                for pair in pairs:
                    values, tensors = measure(*pair, options.rounds)
                    cells += [f"{values:.2f}", f"{tensors:.2f}", f"{values / tensors:.2f}"]
                print(f"| {inputs} to {outputs}, {size} | {' | '.join(cells)} |", flush=True)
        print(f"\nms, medians of {options.rounds} interleaved runs")


if __name__ == "__main__":
    main()
