"""Bounds on the time of each kernel of a ResNet-50 step, from its machine code: no GPU is asked.

Run:  python benchmarks/machine_code.py [--device h100] [--kernel conv1x1_dgrad] [--record benchmarks/results]

Of a training step and of evaluation (bf16, batch 256) every launch of this package's kernels is compiled for the device
as a GPU would be given it, and read: `sass.py` finds the loops, `loop_trips.py` how often each is gone round,
`issue_bounds.py` what that takes. The first table has a line for each kernel and shape, the counts being those of one
warp in one round of its main loop; the second sums up by kernel.

Bounds suppose that nothing waits, neither for a load nor at a barrier. Low is the largest of a launch's bounds, memory
at the share of its bandwidth that `plan/devices.py` assumes; high is that of memory and the kernel's own, one after the
other, and what memory lacks where too few bytes are on their way. Predictions, not measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter

import binaries
import cuda_binaries
import issue_bounds
import loop_trips
import sass
import torch
from binaries import Start

import resnet_fused
from resnet_fused.backends import cards
from resnet_fused.backends import triton as room
from resnet_fused.bench import runs
from resnet_fused.models import resnet50
from resnet_fused.ops import OPS
from resnet_fused.plan import devices
from resnet_fused.plan.devices import Device
from resnet_fused.traffic.calls import calls

SHAPE = (256, 3, 224, 224)
ALLOWED = 1.5  # times its memory bound, that a kernel's own may take without a word
SMALL = 2e-6  # seconds, below which the start of a launch takes longer than all of it
DEVICES = ("a100", "h100", "b200")
COUNTS = ("tensor", "load", "copy", "store", "shared", "integer", "convert", "float", "byte load", "single")


@dataclasses.dataclass(frozen=True)
class Row:
    """A launch, and how often a step starts one like it."""

    start: Start
    count: int
    bounds: issue_bounds.Bounds
    kinds: Counter[str]  # of a round of the main loop
    instructions: int  # in it
    tensor_clocks: float  # of a multiprocessor, for a block's products in it
    resident: int  # blocks of a multiprocessor
    in_flight: float  # bytes on their way to it
    needed: float  # of them, for memory to be busy
    flops: float  # of a launch, with padding

    @property
    def low(self) -> float:
        return max(self.bounds.memory / devices.BANDWIDTH_SHARE, self.bounds.own)

    @property
    def high(self) -> float:
        late = max(1.0, self.needed / self.in_flight) if self.in_flight else 1.0
        return self.bounds.memory / devices.BANDWIDTH_SHARE * late + self.bounds.own

    @property
    def why(self) -> str:
        """What makes its own bound more than is allowed; empty if it is not."""
        if self.excess <= ALLOWED:
            return ""
        products = self.bounds.tensor / self.bounds.memory  # which no other code would spare, but other instructions
        return self.bounds.reason + (f", where products alone are {products:.1f}" if products > ALLOWED else "")

    @property
    def excess(self) -> float:
        """The kernel's own bound by memory's; 0 for what is over before it matters."""
        return self.bounds.own / self.bounds.memory if self.bounds.own > SMALL else 0.0


def row(start: Start, count: int, device: Device) -> Row:
    """What a launch's machine code says of it."""
    binary, arch = start.binary, 10 * device.capability[0] + device.capability[1]
    code = list(binary.code)
    blocks = sass.blocks(code)
    counted = loop_trips.frequencies(blocks, code, binary.warps, start.trips)
    of_block = issue_bounds.Work()
    for block, often in zip(blocks, counted.often, strict=True):
        of_block += issue_bounds.work(block.code, code, binary.warps).times(often)
    main = [] if counted.main is None else [i for b in sorted(counted.main.blocks) for i in blocks[b].code]
    resident = issue_bounds.resident(binary.registers, binary.shared, binary.warps, arch)
    resident = min(resident, -(-start.programs // device.sms))
    round_of_it = issue_bounds.work(main, code, binary.warps)
    copied = any(each.kind == "copy" for each in main)
    in_flight = round_of_it.loaded * resident * (max(1, binary.stages - 1) if copied else 1)
    bounds = issue_bounds.bounds(of_block, start.programs, start.moved, device)
    one = issue_bounds.bounds(round_of_it, 1, 0, device)
    clocks = one.tensor * issue_bounds.clock(device)
    needed = issue_bounds.needed_in_flight(device)
    kinds, flops = sass.kinds(main), of_block.flops * start.programs
    return Row(start, count, bounds, kinds, len(main), clocks, resident, in_flight, needed, flops)


def starts(device: Device, training: bool, kernel: str) -> tuple[list[tuple[Start, int]], list[str]]:
    """The launches in a step of this package's kernels with `kernel` in their name, with how often each is made.

    And the ops whose kernels are not read.
    """
    card = cards.Card(10 * device.capability[0] + device.capability[1], device.sms)
    x = torch.empty(SHAPE, device="meta")
    found = calls(resnet50(), x, training, device, torch.bfloat16, incomplete=True)
    launches, made, unread = [], [], []
    for call, count in found.items():
        compiled = cuda_binaries.starts_of(call, card)
        if compiled:
            made += [(start, count) for start in compiled if kernel in start.kernel]
        elif compiled is None and call.op in room.kernels():
            own = room.kernels()[call.op].launches(call.args, {}, card)
            launches += [(launch, count) for launch in own if kernel in launch.kernel.fn.__name__]
        else:
            unread.append(call.op)
    binaries.compile_together([launch for launch, _ in launches], card.arch)
    made += [(binaries.start_of(launch, card.arch), count) for launch, count in launches]
    merged: dict[tuple, list] = {}
    for start, count in made:
        merged.setdefault((start.kernel, start.shape, start.programs), [start, 0])[1] += count
    return [(start, count) for start, count in merged.values()], sorted(set(unread))


def others(device: Device, training: bool) -> tuple[float, float]:
    """Expected seconds of what is not ours in a step: the roofline, and that at the share a step is sure to reach."""
    told = resnet_fused.explain(resnet50(), SHAPE, training=training, dtype=torch.bfloat16, device=device)
    low = devices.predict([o for o in told.model.fused.operations if o.name not in OPS], device)
    return low, low / devices.SURE_SHARE


def markdown(lines: list[list[str]]) -> str:
    head, *rest = lines
    marks = ["---" if i < 2 else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *rest))


def by_launch(rows: list[Row]) -> str:
    """A line for each kernel and shape."""
    head = [
        "kernel",
        "shape; tile; arguments",
        "times",
        "registers",
        "spilled",
        "shared KB",
        "blocks an SM",
        "KB in flight, needed",
    ]
    head += ["instructions a round", *COUNTS, "tensor clocks a round"]
    head += ["us: issue", "pipes", "shared", "tensor", "memory", "own by memory", "why"]
    lines = [head]
    for each in sorted(rows, key=lambda r: (r.start.kernel, -r.count * r.low)):
        b, binary = each.bounds, each.start.binary
        cells = [each.start.kernel.removesuffix("_kernel"), each.start.shape, str(each.count)]
        cells += [str(binary.registers), str(binary.spilled or ""), f"{binary.shared / 1024:.0f}", str(each.resident)]
        cells += [f"{each.in_flight / 1024:.0f} of {each.needed / 1024:.0f}", str(each.instructions)]
        cells += [str(each.kinds[kind]) for kind in COUNTS] + [f"{each.tensor_clocks:.0f}"]
        cells += [f"{1e6 * t:.0f}" for t in (b.issue, b.pipes, b.shared, b.tensor, b.memory)]
        cells += [f"{each.excess:.2f}" if each.excess else "", each.why]
        lines.append(cells)
    return markdown(lines)


def by_kernel(rows: list[Row]) -> str:
    """A line for each kernel: milliseconds of a step."""
    head = ["kernel", "launches", "ms: issue", "pipes", "shared", "tensor", "memory", "predicted low", "high"]
    sums: dict[str, list[float]] = {}
    for each in rows:
        b = each.bounds
        found = (b.issue, b.pipes, b.shared, b.tensor, b.memory, each.low, each.high)
        total = sums.setdefault(each.start.kernel.removesuffix("_kernel"), [0] * 8)
        total[0] += each.count
        for i, seconds in enumerate(found, 1):
            total[i] += each.count * seconds
    sums["all of them"] = [sum(column) for column in zip(*sums.values(), strict=True)]
    lines = [[name, f"{int(total[0])}", *(f"{1e3 * t:.2f}" for t in total[1:])] for name, total in sums.items()]
    return markdown([head, *lines])


def report(name: str, training: bool, kernel: str) -> str:
    device = devices.find(name)
    found, unread = starts(device, training, kernel)
    rows = [row(start, count, device) for start, count in found]
    step = "training step" if training else "evaluation"
    texts = [f"## ResNet-50, {step}, batch {SHAPE[0]}, bf16, {device.name}", by_kernel(rows)]
    if unread:
        texts.append(f"Without the kernels of {', '.join(unread)}, which were not read.")
    if not kernel:
        low, high = (sum(row.count * getattr(row, name) for row in rows) for name in ("low", "high"))
        least, most = others(device, training)
        whole = f"{1e3 * (low + least):.0f} to {1e3 * (high + most):.0f} ms"
        texts.append(f"With {1e3 * least:.1f} to {1e3 * most:.1f} ms for what others compute: {whole} predicted.")
    return "\n\n".join([*texts, by_launch(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, action="append", help="default: all of them")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--mode", choices=("training", "evaluation"), help="default: both")
    runs.add_option(parser)
    options = parser.parse_args()
    with runs.printing("machine_code", options.record, dtype="bf16", batch=SHAPE[0]):
        for name in options.device or DEVICES:
            for mode in [options.mode] if options.mode else ["training", "evaluation"]:
                print(report(name, mode == "training", options.kernel) + "\n")


if __name__ == "__main__":
    main()
