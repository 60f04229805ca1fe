"""Read the machine code of a kernel: instructions, blocks, loops, and what kinds of instructions are in them.

What is read is the output of ``cuobjdump -sass``. Nothing here knows a device or a kernel.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[\dT]+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
TARGET = re.compile(r"0x[0-9a-f]+")

#: Kinds by the beginning of an opcode; the first that fits. What fits none is "integer".
KINDS = (
    ("tensor", ("HMMA", "HGMMA", "IMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")),
    ("copy", ("LDGSTS", "UTMALDG", "UBLKCP")),  # from global to shared memory, past registers
    ("load", ("LDG", "LD.")),
    ("store", ("STG", "ST.", "UTMASTG", "RED", "ATOM")),
    ("shared", ("LDSM", "LDS", "STSM", "STS", "ATOMS")),
    ("tensor memory", ("LDTM", "STTM", "UTCCP")),
    ("shuffle", ("SHFL", "MATCH", "VOTE", "REDUX", "CREDUX")),
    ("convert", ("F2FP", "F2F", "I2F", "F2I", "I2I", "FRND", "HADD2.F32", "HADD2.BF16")),
    ("float", ("FADD", "FMUL", "FFMA", "FSEL", "FSET", "FMNMX", "FCHK", "FSWZ", "MUFU", "HADD2", "HMUL2", "HFMA2",
               "HSET", "HMNMX", "DADD", "DMUL", "DFMA")),
    ("control", ("BRA", "BRX", "JMP", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BAR", "BREAK", "WARPSYNC", "DEPBAR",
                 "LDGDEPBAR", "SYNCS", "MEMBAR", "FENCE", "NOP", "YIELD", "ARRIVES", "WARPGROUP", "UTCBAR", "ERRBAR",
                 "CCTL", "ELECT", "NANOSLEEP", "BMOV", "ACQBULK", "UTCATOMSWS", "CGAERRBAR", "UCGABAR", "PREEXIT")),
    ("constant", ("LDC", "ULDC", "LDCU", "S2R", "S2UR", "CS2R", "R2UR", "B2R")),
)  # fmt: skip
#: Of what is "float", what runs beside integers on the narrower of the two ordinary pipes; "convert" does too.
ON_ALU = ("FSEL", "FSET", "FMNMX")
#: Of what is "integer", what runs on the pipe of multiply-adds.
ON_FMA = ("IMAD",)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    predicate: str  # "@P0", "@!UP1", or ""
    opcode: str  # with all of its modifiers
    operands: str

    @property
    def kind(self) -> str:
        for kind, beginnings in KINDS:
            if self.opcode.startswith(beginnings):
                return kind
        return "integer"

    @property
    def uniform(self) -> bool:
        """Whether it runs on the scalar unit, once a warp."""
        return self.kind == "integer" and self.opcode.startswith("U")

    @property
    def bytes(self) -> int:
        """That a thread moves by it, where it moves any."""
        if self.opcode.startswith("LDSM") or self.opcode.startswith("STSM"):
            return 4 * int((re.search(r"\.M\w+\.(\d)", self.opcode) or [0, 1])[1])
        for width, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2), ("256", 32)):
            if re.search(rf"\.{width}\b", self.opcode):
                return size
        return 4

    @property
    def target(self) -> int | None:
        """Where it may jump to."""
        if not self.opcode.startswith(("BRA", "JMP", "CALL")):
            return None
        found = TARGET.findall(self.operands)
        return int(found[-1], 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        name = self.opcode.partition(".")[0]
        if name not in ("BRA", "JMP", "BRX", "EXIT", "RET"):
            return True
        divergent = ".DIV" in self.opcode or bool(re.search(r"\bU?P\d", self.operands))
        return bool(self.predicate) or divergent


@dataclasses.dataclass(frozen=True)
class Block:
    """Instructions that run one after the other, and the indices of the blocks that may follow."""

    code: tuple[Instruction, ...]
    after: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop: the indices of its first block and of all of its blocks, those of inner loops too."""

    header: int
    blocks: frozenset[int]
    every: frozenset[int]  # of the blocks, those on each way round


def functions(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each function of a disassembly, by its name."""
    parts = FUNCTION.split(text)
    return {name: instructions(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def instructions(text: str) -> list[Instruction]:
    """The instructions of one function."""
    return [
        Instruction(int(address, 16), predicate, opcode, operands.strip())
        for address, predicate, opcode, operands in INSTRUCTION.findall(text)
    ]


def blocks(code: list[Instruction]) -> list[Block]:
    """Cut `code` where something is jumped to and behind what jumps."""
    starts = {code[0].address} | {i.target for i in code if i.target is not None}
    starts |= {b.address for a, b in itertools.pairwise(code) if a.target is not None or not a.goes_on}
    parts: list[list[Instruction]] = []
    for each in code:
        if each.address in starts:
            parts.append([])
        parts[-1].append(each)
    index = {part[0].address: i for i, part in enumerate(parts)}

    def after(i: int, last: Instruction) -> tuple[int, ...]:
        found = [index[last.target]] if last.target in index else []
        return tuple(found + ([i + 1] if last.goes_on and i + 1 < len(parts) else []))

    return [Block(tuple(part), after(i, part[-1])) for i, part in enumerate(parts)]


def loops(found: list[Block]) -> list[Loop]:
    """The loops of a function, outer ones first: of each block that an edge from one that it dominates leads to."""
    before: list[list[int]] = [[] for _ in found]
    for i, block in enumerate(found):
        for j in block.after:
            before[j].append(i)
    dominators = _dominators(found, before)
    ends: dict[int, set[int]] = {}
    for i, block in enumerate(found):
        for j in block.after:
            if i in dominators and j in dominators[i]:
                ends.setdefault(j, set()).add(i)
    made = [_loop(header, latches, found, before) for header, latches in ends.items()]
    return sorted(made, key=lambda loop: (-len(loop.blocks), loop.header))


def _dominators(found: list[Block], before: list[list[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached: those on every way to it, itself included."""
    reached = _reach(0, {i: block.after for i, block in enumerate(found)}, set())
    every = {i: set(reached) for i in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            new = set.intersection(*(every[p] for p in before[i] if p in reached)) | {i}
            changed, every[i] = changed or new != every[i], new
    return every


def _loop(header: int, latches: set[int], found: list[Block], before: list[list[int]]) -> Loop:
    inside = {header} | _reach_all(latches - {header}, before, {header})
    edges = {i: [j for j in found[i].after if j in inside] for i in inside}
    every = {i for i in inside if i == header or not latches - {i} & _reach(header, edges, {i})}
    return Loop(header, frozenset(inside), frozenset(every | {header}))


def _reach(start: int, edges, without: set[int]) -> set[int]:
    return _reach_all({start}, edges, without)


def _reach_all(starts: set[int], edges, without: set[int]) -> set[int]:
    """What can be reached from `starts`, these too, past nothing of `without`."""
    seen, waiting = set(starts) - without, list(set(starts) - without)
    while waiting:
        for j in edges[waiting.pop()]:
            if j not in seen and j not in without:
                seen.add(j)
                waiting.append(j)
    return seen


def own_blocks(loop: Loop, all_of_them: Iterable[Loop]) -> frozenset[int]:
    """Of a loop's blocks those that are in no loop within."""
    inner = [other.blocks for other in all_of_them if other.blocks < loop.blocks]
    return loop.blocks - frozenset().union(*inner)


def kinds(code: Iterable[Instruction]) -> Counter[str]:
    """How many instructions there are of each kind; and "single" conversions to 16 bits, which packed make two."""
    found: Counter[str] = Counter()
    for each in code:
        found[each.kind] += 1
        alone = each.opcode.startswith("F2FP") and re.search(r"\bRZ\b", each.operands)
        if alone or each.opcode.startswith(("F2F.BF16", "F2F.F16")):
            found["single"] += 1
        if each.opcode.startswith("LDG.") and each.bytes == 1:
            found["byte load"] += 1
    return found


def product_shape(each: Instruction, code: list[Instruction]) -> tuple[int, int, int] | None:
    """Rows, columns and depth of a product on tensor cores, as the instruction says or its descriptor does.

    ``HMMA.16816``: of a warp; ``HGMMA.64x128x16``: of four warps; ``UTCHMMA``: of the thread that issues it for all.
    The descriptor of the latter (PTX, tcgen05 "instruction descriptor") comes in a uniform register, whose constant is
    looked for among the instructions before.
    """
    if match := re.search(r"MMA\.(\d+)x(\d+)x(\d+)", each.opcode):
        return tuple(map(int, match.groups()))
    if match := re.search(r"[HI]MMA\.16(8|16)(\d+)", each.opcode):
        columns, depth = map(int, match.groups())
        return 16, columns, depth
    if not each.opcode.startswith("UTC") or not (register := re.search(r"idesc\[(UR\d+)\]", each.operands)):
        return None
    constant = _constant(register[1], each, code)
    if constant is None:
        return None
    depth = 8 if "TF32" in each.opcode or constant >> 7 & 7 == 2 else 16
    return (constant >> 24 & 31) << 4, (constant >> 17 & 63) << 3, depth


def _constant(register: str, user: Instruction, code: list[Instruction]) -> int | None:
    """The last constant that is written to a uniform register before its user."""
    wanted = re.compile(rf"{register}, (?:0x([0-9a-f]+)|UR\w+, 0x([0-9a-f]+))")
    for each in reversed([i for i in code if i.address < user.address]):
        if each.opcode.startswith(("UMOV", "USEL", "UIADD3")) and (match := wanted.match(each.operands)):
            return int(match[1] or match[2], 16)
    return None


def flops(each: Instruction, code: list[Instruction], warps: int) -> int:
    """That a whole block of so many warps does by one product instruction."""
    shape = product_shape(each, code)
    if shape is None:
        return 0
    rows, columns, depth = shape
    at_once = 1 if each.opcode.startswith("UTC") else warps // 4 if "GMMA" in each.opcode else warps
    return 2 * rows * columns * depth * at_once
