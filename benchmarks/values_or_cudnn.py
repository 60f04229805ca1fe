"""Whether `conv_values` pays beside what it spares: a pass that normalises, and a read for statistics. No GPU is asked.

Run:  python benchmarks/values_or_cudnn.py [--device h100] [--share 0.6] [--record benchmarks/results]

Of each distinct call in a training step (bf16, batch 256), in microseconds: ours are the bounds that machine_code.py
finds, its merge of statistics with them. Theirs is a pass over what is read (if it is to be normalised), cuDNN's
convolution at a share of the peak of tensor cores, which is assumed, or as memory allows, and a read of the result; all
passes at the share of memory's bandwidth that `plan/devices.py` assumes, and its time for each launch more. *Even* is
the share of the peak at which cuDNN's convolution makes both equal, for our low and our high bound: where it reaches
more, `conv_values` loses. *Kept* is the same where what is read is kept for backward, which spares theirs a pass there.
"""

from __future__ import annotations

import argparse
import math

import cuda_binaries
import machine_code
import torch
from torch import nn

from resnet_fused.backends.cards import Card
from resnet_fused.bench import runs
from resnet_fused.models import resnet18, resnet50
from resnet_fused.plan import devices
from resnet_fused.plan.devices import Device
from resnet_fused.traffic.calls import Call, calls

HEAD = ["shape; tile; arguments", "times", "low", "high", "pass", "cuDNN", "read", "theirs"]
HEAD += ["even: low", "high", "kept: low", "high"]
MODELS = {"ResNet-18": resnet18, "ResNet-50": resnet50}


def even(flops: int, device: Device, left: float) -> str:
    """The share of the peak at which a convolution takes the seconds that are left for it."""
    share = flops / device.half / left if left > 0 else math.inf
    return f"{share:.2f}" if share < 1 else "-"


def line(call: Call, count: int, device: Device, share: float) -> list[str]:
    """A call in a step, the shape first."""
    card = Card(10 * device.capability[0] + device.capability[1], device.sms)
    rows = [machine_code.row(start, count, device) for start in cuda_binaries.starts_of(call, card)]
    low, high = sum(row.low for row in rows), sum(row.high for row in rows)
    of, rate = cuda_binaries.Convolution(call), devices.BANDWIDTH_SHARE * device.bandwidth
    size, flops = of.x.element_size(), call.contract.flops(*call.args)
    rewrite = 2 * size * of.x.numel() / rate + device.overhead if of.given.get("x_scale") is not None else 0.0
    read = size * of.pixels * of.k / rate + device.overhead
    cudnn = max(of.moved / rate, flops / (share * device.half))
    times = [f"{1e6 * t:.0f}" for t in (low, high, rewrite, cudnn, read, rewrite + cudnn + read)]
    shares = [even(flops, device, t - rewrite - read) for t in (low, high)]
    kept = [even(flops, device, t - read) for t in (low, high)] if rewrite else ["", ""]
    return [rows[0].start.shape, str(count), *times, *shares, *kept]


def report(name: str, model: nn.Module, device: Device, share: float) -> str:
    """A table of all calls of a model."""
    x = torch.empty(machine_code.SHAPE, device="meta")
    found = calls(model, x, True, device, torch.bfloat16)
    lines = [line(call, count, device, share) for call, count in found.items() if call.op == "conv_values"]
    title = f"## {name}, training step, batch {machine_code.SHAPE[0]}, bf16, {device.name}; cuDNN at {share:.2f}"
    return f"{title}\n\n{machine_code.markdown([HEAD, *lines])}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=machine_code.DEVICES, action="append", help="default: all of them")
    parser.add_argument("--share", type=float, default=devices.COMPUTE_SHARE, help="of the peak, default: %(default)s")
    runs.add_option(parser)
    options = parser.parse_args()
    with runs.printing("values_or_cudnn", options.record, dtype="bf16", batch=machine_code.SHAPE[0]):
        for name in options.device or machine_code.DEVICES:
            for model, build in MODELS.items():
                print(report(model, build(), devices.find(name), options.share))


if __name__ == "__main__":
    main()
