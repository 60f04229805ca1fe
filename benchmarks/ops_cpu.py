"""GB/s of the CPU kernels against a plain copy and stock's ops, GFLOP/s of the Gram matrix against a matrix product.

Run:  python benchmarks/ops_cpu.py [--dtype bfloat16] [--rounds 9] [--gram]

Bytes are those the op must move (``Op.bytes``); stock's ops are credited with what an ideal pass of theirs must move.
"""

from __future__ import annotations

import argparse

import torch

from resnet_fused.backends import backends
from resnet_fused.bench.timing import Rounds, clock_for, interleave
from resnet_fused.ops import OPS
from resnet_fused.ops.contract import channels_last_like

SHAPES = ((16, 64, 56, 56), (16, 256, 56, 56), (16, 1024, 14, 14))
GRAM_SHAPES = ((16, 64, 56, 56), (16, 128, 28, 28), (16, 256, 14, 14), (16, 512, 7, 7), (16, 256, 56, 56))
aten = torch.ops.aten
KERNELS = backends()["cpu"].kernels


def activations(shape, dtype=torch.float32):
    return channels_last_like(torch.empty(shape, dtype=dtype)).copy_(torch.randn(shape))


def timed(calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each call, run in turn."""
    contenders = {name: lambda lap, call=call: (call(), lap("run")) for name, call in calls.items()}
    times = interleave(contenders, Rounds(at_least=rounds, at_most=rounds), clock_for(torch.device("cpu")))
    return {name: laps["total"].median / 1e3 for name, laps in times.items()}


def pointwise(shape, dtype, rounds: int) -> None:
    z, residual, g = (activations(shape, dtype) for _ in range(3))
    scale, shift = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    mean = torch.randn(shape[1])
    out, mask = KERNELS["norm_add_relu"].run(z, scale, shift, residual, emit_mask=True)
    into, size = torch.empty_like(z), z.numel() * z.element_size()
    ours = {
        "bn_stats": ("bn_stats", (z,), {}),
        "norm_relu": ("norm_add_relu", (z, scale, shift), {}),
        "norm_add_relu, mask": ("norm_add_relu", (z, scale, shift, residual), {"emit_mask": True}),
        "backward, sign recomputed": ("norm_add_relu_backward", (g, z, mean, scale, shift), {}),
        "backward, bits": ("norm_add_relu_backward", (g, z, mean), {"mask": mask}),
        "backward, bits, sums only": ("norm_add_relu_backward", (g, z, mean), {"mask": mask, "emit_grad": False}),
        "lazy_grad_apply": ("lazy_grad_apply", (g, z, scale, scale, shift), {}),
        "lazy_grad_apply, sign": ("lazy_grad_apply", (g, z, scale, scale, shift, scale, shift), {}),
    }
    calls = {label: (lambda n=n, a=a, k=k: KERNELS[n].run(*a, **k)) for label, (n, a, k) in ours.items()}
    moved = {label: OPS[n].bytes(*a, **k) for label, (n, a, k) in ours.items()}
    stock = {
        "copy into old memory": (lambda: into.copy_(z), 2),
        "copy into new memory": (lambda: z.clone(), 2),
        "stock batch_norm": (lambda: torch.native_batch_norm(z, scale, shift, None, None, True, 0.1, 1e-5), 3),
        "stock relu backward": (lambda: aten.threshold_backward(g, out, 0), 3),
        "stock batch_norm backward": (
            lambda: aten.native_batch_norm_backward(g, z, scale, None, None, shift, scale, True, 1e-5, [True] * 3),
            5,
        ),
    }
    calls |= {label: call for label, (call, _) in stock.items()}
    moved |= {label: passes * size for label, (_, passes) in stock.items()}
    print(f"\n{tuple(shape)} {dtype}, {size / 1e6:.1f} MB, {torch.get_num_threads()} threads")
    for label, seconds in timed(calls, rounds).items():
        print(f"  {label:28s} {seconds * 1e3:7.2f} ms {moved[label] / seconds / 1e9:6.1f} GB/s")


def gram(shape, rounds: int) -> None:
    a = activations(shape).relu_()
    centre, channels = a.mean((0, 2, 3)), shape[1]
    rows, weight = a.permute(0, 2, 3, 1).reshape(-1, channels), torch.empty(channels, channels, 1, 1)
    arguments = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])
    calls = {
        "gram": lambda: KERNELS["gram"].run(a, centre),
        "matrix product, not shifted": lambda: rows.T @ rows,
        "weight gradient, not shifted": lambda: aten.convolution_backward(a, a, weight, *arguments),
    }
    exact = OPS["gram"].reference(a.double(), centre.double())[0]
    shifted = rows - centre
    errors = [KERNELS["gram"].run(a, centre)[0], shifted.T @ shifted]
    errors = [((e - exact).norm() / exact.norm()).item() for e in errors]
    print(f"\n{tuple(shape)}: error of gram {errors[0]:.1e}, of a float32 product of the shifted rows {errors[1]:.1e}")
    for label, seconds in timed(calls, rounds).items():
        print(
            f"  {label:28s} {seconds * 1e3:7.2f} ms {OPS['gram'].flops(a, centre) / seconds / 1e9:6.1f} GFLOP/s needed"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--gram", action="store_true", help="only the Gram matrix")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        for shape in () if options.gram else SHAPES:
            pointwise(shape, getattr(torch, options.dtype), options.rounds)
        for shape in GRAM_SHAPES:
            gram(shape, options.rounds)


if __name__ == "__main__":
    main()
