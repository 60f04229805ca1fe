"""What the cost model knows of a device, and the time it expects an operation to take there.

A roofline: an operation takes the longer of moving its bytes and doing its arithmetic, plus the start of its kernels::

    t = max(bytes / (BANDWIDTH_SHARE * bandwidth), flops / (COMPUTE_SHARE * peak(dtype))) + launches * overhead

The two shares and the overhead are assumptions, not measured: no kernel reaches a data sheet's figures. Neither what
stays in the L2 cache between two operations nor what runs side by side is modelled, so small batches look slower than
they are. That time is the low end of what is expected: an :class:`Expected` has a high end and the host's part too.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable

import torch

from ..backends import tf32
from ..backends.constant import constant_in_graphs
from ..steps.conv import cpu_info

#: Shares of the data sheet's figures that a good kernel is assumed to reach.
BANDWIDTH_SHARE = 0.85
COMPUTE_SHARE = 0.60

#: Seconds from the end of a kernel to the start of the next that waits in the same stream; assumed.
LAUNCH_OVERHEAD = 2e-6

#: Share of the roofline that a whole step is sure to reach; assumed. Reading the machine code of this package's kernels
#: puts ResNet-50's step on an H100 at 36 to 48 ms where the roofline says 22 (a share of 0.61 to 0.46), and cuDNN's own
#: notes give its channels_last batch norm 0.44 to 0.56 of a device copy's bandwidth.
SURE_SHARE = 0.45

#: Seconds of Python and PyTorch on the host for each kernel that a program starts; a CUDA graph saves them. Assumed not
#: below what ``benchmarks/host_time.py``, where launches are stubbed, found for ours on one core of an AMD EPYC
#: (benchmarks/results/epyc-zen5-2core/runs.jsonl:11): a step of as many layers as ResNet-50 has, under autocast, took
#: 16.2 ms fused, for 411 kernels, and 33.0 ms in eager, for 563, with the arithmetic of very narrow layers in it; with
#: 10 us for each of Triton's 349 launches 48 us a kernel of ours. Assumed as well: that the host of a GPU is as fast as
#: that core, and what torch.compile's wrapper takes.
HOST_SECONDS = {"fused": 56e-6, "stock": 48e-6, "compiled": 20e-6}

_TERA, _MIB = 1e12, 1 << 20


@dataclasses.dataclass(frozen=True)
class Device:
    """A device in figures. Rates are dense ones, of products that accumulate in float32."""

    name: str
    bandwidth: float  # of its memory, bytes per second
    half: float  # FLOP/s of bfloat16 and float16 in tensor cores
    tf32: float  # FLOP/s of float32 rounded to TF32 in tensor cores
    single: float  # FLOP/s of float32 outside of tensor cores
    l2: int = 0  # bytes
    sms: int = 1
    capability: tuple[int, int] = (0, 0)
    overhead: float = LAUNCH_OVERHEAD  # seconds per kernel
    bandwidth_share: float = BANDWIDTH_SHARE
    compute_share: float = COMPUTE_SHARE
    reported: str = ""  # the name by which CUDA knows exactly this board

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of a product in `dtype`; float32 as TF32 where PyTorch's setting for convolutions allows it."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.half
        return self.tf32 if dtype == torch.float32 and tf32.allowed() else self.single

    def seconds(self, bytes: int, flops: int, dtype: torch.dtype, launches: int = 1, full: int = 0) -> float:
        """Expected time of one operation; `full`: FLOPs in float32 outside of tensor cores, whatever its data are."""
        computing = (flops - full) / self.peak(dtype) + full / self.single
        moving = bytes / (self.bandwidth_share * self.bandwidth)
        return max(moving, computing / self.compute_share) + launches * self.overhead


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a program: what it moves and computes, and how many kernels do it."""

    name: str
    bytes: int
    flops: int
    dtype: torch.dtype  # of its data
    launches: int = 1
    full: int = 0  # FLOPs in full float32, which tensor cores cannot


def predict(operations: Iterable[Operation], device: Device) -> float:
    """Expected seconds of `operations`, one after the other, on `device`."""
    return sum(device.seconds(o.bytes, o.flops, o.dtype, o.launches, o.full) for o in operations)


@dataclasses.dataclass(frozen=True)
class Expected:
    """Expected seconds of a program on a GPU: a range, as no GPU was asked."""

    low: float  # every kernel at the roofline, all starts hidden behind kernels that run
    high: float  # at SURE_SHARE of it, or as long as the host needs, whichever is longer
    host: float  # the host's part: what it needs to start all kernels


def expect(operations: Iterable[Operation], device: Device, side: str) -> Expected:
    """What to expect of `operations`, as a program of `side` ("fused", "stock" or "compiled") on `device`."""
    operations = list(operations)
    low, host = predict(operations, device), sum(o.launches for o in operations) * HOST_SECONDS[side]
    return Expected(low, max(low / SURE_SHARE, host), host)


#: One core; the choice depends on the ratio alone. 85 GFLOP/s in f32 convolutions and 7 GB/s were measured on an
#: AMD EPYC (Zen 3) with 2 cores. They are what it reaches, hence no shares.
CPU_CORE = Device("cpu core", 7e9, 85e9, 85e9, 85e9, overhead=0.0, bandwidth_share=1.0, compute_share=1.0)

#: Known boards, by the name that `explain` takes. Bandwidth and rates: NVIDIA's data sheets ("A100 80GB", "H100 Tensor
#: Core GPU", "H200 Tensor Core GPU", "Blackwell Architecture Technical Brief" for HGX B200) and the white paper "Ada
#: GPU Architecture", appendix A; where a sheet gives a rate with sparsity, half of it. SMs and L2: the architecture
#: white papers; of the B200, where none says, what the driver reports (deviceQuery in github.com/pytorch/ao/pull/4002).
#: The B200's bandwidth is from there too, 7680 bits at 3996 MHz: the sheet's 8 TB/s are rounded.
DEVICES = {
    "a100": Device(
        "A100 SXM 80GB", 2.039 * _TERA, 312 * _TERA, 156 * _TERA, 19.5 * _TERA, 40 * _MIB, 108, (8, 0),
        reported="NVIDIA A100-SXM4-80GB",
    ),
    "h100": Device(
        "H100 SXM", 3.35 * _TERA, 989.5 * _TERA, 494.5 * _TERA, 67 * _TERA, 50 * _MIB, 132, (9, 0),
        reported="NVIDIA H100 80GB HBM3",
    ),
    "h200": Device(
        "H200 SXM", 4.8 * _TERA, 989.5 * _TERA, 494.5 * _TERA, 67 * _TERA, 50 * _MIB, 132, (9, 0),
        reported="NVIDIA H200",
    ),
    "b200": Device(
        "B200", 7.67 * _TERA, 2250 * _TERA, 1100 * _TERA, 80 * _TERA, 253 * _MIB // 2, 148, (10, 0),
        reported="NVIDIA B200",
    ),
    "rtx4090": Device(
        "RTX 4090", 1.008 * _TERA, 165.2 * _TERA, 82.6 * _TERA, 82.6 * _TERA, 72 * _MIB, 128, (8, 9),
        reported="NVIDIA GeForce RTX 4090",
    ),
}  # fmt: skip

#: FLOP per clock and SM by compute capability, in 16-bit tensor cores and in float32 outside of them; TF32 has half the
#: former, none before 8.0. From the same white papers: rate / SMs / boost clock.
PER_CLOCK = {
    (7, 0): (1024, 128),
    (7, 5): (1024, 128),
    (8, 0): (2048, 128),
    (8, 6): (512, 256),
    (8, 9): (512, 256),
    (9, 0): (4096, 256),
    (10, 0): (8192, 256),
    (10, 3): (8192, 256),
    (12, 0): (512, 256),
}
_CLOCK = 1.6e9  # where a driver does not tell


def find(name: str) -> Device:
    """The entry of :data:`DEVICES` called `name`, whatever its case, spaces and hyphens.

    Raises:
        ValueError: there is none; the text lists what is accepted.
    """
    key = "".join(c for c in name.lower() if c.isalnum())
    if key not in DEVICES:
        raise ValueError(f"unknown device {name!r}; pass one of {', '.join(map(repr, DEVICES))}")
    return DEVICES[key]


def probe(device: torch.device) -> Device:
    """A GPU that has no entry, from what it tells about itself.

    Rates are SMs times clock times what an SM of its capability (or of the newest one known before it) does in a clock.
    Where the driver or PyTorch does not tell the memory's speed, it is that of the known board of the nearest
    capability, in proportion to the SMs.
    """
    told = torch.cuda.get_device_properties(device)
    capability, sms = (told.major, told.minor), told.multi_processor_count
    half, single = PER_CLOCK[max((known for known in PER_CLOCK if known <= capability), default=(7, 0))]
    clocks = sms * (1e3 * getattr(told, "clock_rate", 0) or _CLOCK)
    wires, tick = getattr(told, "memory_bus_width", 0), 1e3 * getattr(told, "memory_clock_rate", 0)
    alike = min(DEVICES.values(), key=lambda d: abs(10 * (d.capability[0] - told.major) + d.capability[1] - told.minor))
    return Device(
        told.name,
        bandwidth=2 * tick * wires / 8 or alike.bandwidth * sms / alike.sms,
        half=half * clocks,
        tf32=(half / 2 if capability >= (8, 0) else single) * clocks,
        single=single * clocks,
        l2=getattr(told, "L2_cache_size", 0),
        sms=sms,
        capability=capability,
        reported=told.name,
    )


def of(device: torch.device) -> Device:
    """The entry for a GPU by its name, else what :func:`probe` finds; a CPU core for everything that is no GPU."""
    if device.type != "cuda":
        return CPU_CORE
    index = torch.cuda.current_device() if device.index is None else device.index
    _ask(index)
    return _gpus[index]


_gpus: dict[int, Device] = {}


@constant_in_graphs
def _ask(index: int) -> bool:
    """Enter this GPU and all others in :data:`_gpus`. While a graph is traced, it is asked and not traced itself.

    All at once, because a graph sees the table as it was when the graph first looked.
    """
    if index not in _gpus:
        for i in range(max(torch.cuda.device_count(), index + 1)):
            device = torch.device("cuda", i)
            name = torch.cuda.get_device_name(device)
            _gpus[i] = next((known for known in DEVICES.values() if known.reported == name), None) or probe(device)
    return True


def cpu_name() -> str:
    """The processor's name as the kernel tells it, or as Python does where there is no /proc.

    With its family and model: a virtual machine may call processors of several generations by one name.
    """
    told = cpu_info()
    if "model name" not in told:
        return platform.processor() or platform.machine()
    return f"{told['model name']} (family {told.get('cpu family', '?')}, model {told.get('model', '?')})"
