"""From counts of instructions and a device: how long a launch takes at least, by what bounds it.

Rates are a multiprocessor's. They are the documented ones (CUDA C++ Programming Guide, "Arithmetic Instructions"; the
architecture white papers), but for three assumptions: products by ``mma.sync`` reach 0.62 of the rate of ``wgmma`` on
sm_90 (about what arXiv 2402.13499 found) and the rate of sm_80 on sm_100; packing two 16-bit floats counts as an
integer instruction; conflicts between banks of shared memory, instruction fetches and waits count nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import sass

from resnet_fused.plan.devices import PER_CLOCK, Device

SLOTS = 4  # instructions that a multiprocessor issues per clock, each to 32 lanes
ALU = 2  # warp instructions per clock of integers, comparisons, selections and packing: 16 lanes in each quarter
FMA = {80: 2, 90: 4, 100: 4}  # of float multiply-adds, and of IMAD half of sm_90's
SPECIAL = 0.5  # of MUFU and of conversions that pack nothing: 16 lanes in all
SHARED_BYTES = 128  # per clock, to and from shared memory
MMA_SYNC = {80: 1.0, 90: 0.62, 100: 2048 / 8192}  # of the rate of the newest product instruction
SHARED_MEMORY = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
RESERVED = 1024  # bytes of shared memory that a block takes besides its own
REGISTERS, MOST_WARPS, MOST_BLOCKS = 65536, 64, 32
LATENCY = 800e-9  # seconds that a load from memory takes on a busy GPU; assumed


@dataclasses.dataclass(frozen=True)
class Work:
    """What a launch does in all: numbers of warp instructions by pipe, FLOPs, and bytes."""

    issued: float = 0
    alu: float = 0
    fma: float = 0
    special: float = 0
    shared: float = 0  # bytes to and from shared memory
    flops: float = 0
    async_flops: float = 0  # of them, by wgmma and tcgen05
    loaded: float = 0  # bytes that loads and copies ask for

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: float) -> Work:
        return Work(*(count * each for each in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that a launch takes at least."""

    issue: float  # by issue slots
    pipes: float  # by the busiest of the pipes behind them
    shared: float  # by the bandwidth of shared memory
    tensor: float  # by tensor cores
    memory: float  # by memory: its bytes at the data sheet's bandwidth

    @property
    def own(self) -> float:
        """What the kernel's code takes at least, whatever memory does."""
        return max(self.issue, self.pipes, self.shared, self.tensor)

    @property
    def reason(self) -> str:
        """What `own` is."""
        names = {"issue": "issue slots", "pipes": "integer and float pipes", "shared": "shared memory"}
        names["tensor"] = "tensor cores"
        return names[max(names, key=lambda name: getattr(self, name))]


def work(code: Iterable[sass.Instruction], whole: list[sass.Instruction], warps: int) -> Work:
    """What a block of so many warps does by running `code`, a part of the function `whole`, once."""
    total = Counter()
    for each in code:
        total["issued"] += warps
        kind = each.kind
        if kind == "tensor":
            done = sass.flops(each, whole, warps)
            total["flops"] += done
            total["async_flops"] += 0 if each.opcode.startswith(("HMMA", "IMMA")) else done
            total["shared"] += operand_bytes(each, whole, warps)
        elif kind in ("shared", "copy"):
            total["shared"] += 32 * warps * each.bytes
        if kind in ("copy", "load"):
            total["loaded"] += 32 * warps * each.bytes
        pipe = pipe_of(each)
        if pipe:
            total[pipe] += warps
    return Work(**total)


def pipe_of(each: sass.Instruction) -> str:
    """Which pipe behind the issue slots an instruction takes; "" for those that are counted otherwise."""
    kind, name = each.kind, each.opcode
    if name.startswith("MUFU") or (kind == "convert" and not name.startswith(("F2FP", "HADD2"))):
        return "special"
    if kind == "float" and not name.startswith(sass.ON_ALU):
        return "fma"
    if kind == "integer" and name.startswith(sass.ON_FMA):
        return "fma"
    return "alu" if kind in ("float", "convert") or (kind == "integer" and not each.uniform) else ""


def operand_bytes(each: sass.Instruction, whole: list[sass.Instruction], warps: int) -> int:
    """Bytes that a product reads from shared memory itself: of 16-bit operands."""
    shape = sass.product_shape(each, whole)
    if shape is None or each.opcode.startswith(("HMMA", "IMMA")):
        return 0
    rows, columns, depth = shape
    from_shared = 1 if "tmem" in each.operands.partition("gdesc")[0] and each.operands.count("gdesc") < 2 else 2
    if "GMMA" in each.opcode:  # gdesc[..] holds both descriptors, unless the first operand is in registers
        from_shared = 1 if each.operands.split(",")[1].strip().startswith("R") else 2
    size = 2 * depth * (columns + (rows if from_shared == 2 else 0))
    return size * (1 if each.opcode.startswith("UTC") else warps // 4)


def resident(registers: int, shared: int, warps: int, arch: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    of_a_warp = -(-registers * 32 // 256) * 256  # a warp's registers come in parts of 256
    by_registers = REGISTERS // (of_a_warp * warps)
    by_shared = SHARED_MEMORY[arch] // (shared + RESERVED)
    return max(1, min(by_registers, by_shared, MOST_WARPS // warps, MOST_BLOCKS))


def clock(device: Device) -> float:
    """Clocks per second, from the rate of its tensor cores."""
    return device.half / (device.sms * PER_CLOCK[device.capability][0])


def bounds(block: Work, programs: int, moved: int, device: Device) -> Bounds:
    """Of a launch of so many blocks, each of which does `block`, that moves so many bytes from and to memory.

    The multiprocessor with most blocks counts.
    """
    arch = 10 * device.capability[0] + device.capability[1]
    blocks, seconds = -(-programs // device.sms), 1 / clock(device)
    pipes = max(block.alu / ALU, block.fma / FMA[arch], block.special / SPECIAL)
    rate = PER_CLOCK[device.capability][0]
    tensor = (block.async_flops + (block.flops - block.async_flops) / MMA_SYNC[arch]) / rate
    cycles = (block.issued / SLOTS, pipes, block.shared / SHARED_BYTES, tensor)
    return Bounds(*(blocks * seconds * each for each in cycles), moved / device.bandwidth)


def needed_in_flight(device: Device) -> float:
    """Bytes on their way to each multiprocessor at which memory is busy."""
    return device.bandwidth * LATENCY / device.sms
