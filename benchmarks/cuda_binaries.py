"""Compile the CUDA kernels that a step starts as the build does, disassemble them, and say what their launches do.

Sizes of tiles and chunks are those of csrc/cuda/kernels, as its headers define and choose them for 16 bits. A tile
counts as a program of its own: blocks take them in turn.
"""

from __future__ import annotations

import functools
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import loop_trips
import sass
from binaries import Binary, Start, resources, told

import build_support
from resnet_fused.backends.cards import Card
from resnet_fused.backends.triton.common import cdiv
from resnet_fused.ops import OPS
from resnet_fused.ops.conv_add_relu import output_shape
from resnet_fused.traffic.calls import Call

ROOT = pathlib.Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda" / "kernels"
#: The launch that each source compiles, of which the instance in bfloat16 is read, by its parameters.
SOURCES = {
    "conv_norm_add_relu": "ConvNormAddReluParams",
    "conv1x1": "Conv1x1Params",
    "conv1x1_join": "Conv1x1JoinParams",
}
GEOMETRY = (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))


def constant(header: str, name: str) -> int:
    """A number that a header of the kernels defines."""
    return int(re.search(rf"\b{name} = (\d+)[,;]", (KERNELS / f"{header}.cuh").read_text())[1])


STAGES, WARPS = constant("conv_tile", "kStages"), constant("conv_tile", "kConvThreads") // 32
ROW_BYTES, CHUNK = constant("shared_matrix", "kRowBytes"), 8  # of a row of a stage; elements of 16 bytes
STEP = ROW_BYTES // 2  # elements of the reduction
PARTIAL = 4 * constant("moments", "kMoments")  # bytes of statistics of an output and a chunk of rows
MERGED = {name: constant("moments", f"kMerge{name}") for name in ("Channels", "Chunks")}  # by a block in a round
#: Bytes of shared memory for each output of a tile, beside the stages.
BESIDE = {"conv_norm_add_relu": 2 * 4, "conv1x1": PARTIAL, "conv1x1_join": 6 * 4}


class Instance(NamedTuple):
    """What tells the kernels of a source apart."""

    rows: int = 0  # of a tile; none: what merges statistics
    cols: int = 0
    vectors: bool = True  # chunks of 16 bytes are copied past registers
    norm: bool = False  # on load
    second: bool = False  # product, of a projection


def instance_of(function: str) -> Instance | None:
    """Of a kernel by its mangled name; None: none of those that are read."""
    if "merge_moments_kernel" in function:
        return Instance()
    tile, rest = r"TileShapeILi(\d+)ELi(\d+)EEELb([01])E", r"(?:NS0_\d+(AsItIs|NormRelu)E)?(?:Lb([01])E)?EEv"
    found = re.search(tile + rest, function)
    if found is None:
        return None
    rows, cols, vectors, prologue, second = found.groups()
    return Instance(int(rows), int(cols), vectors == "1", prologue == "NormRelu", second == "1")


def as_built(nvcc: str, arch: int) -> str:
    """The flag of the default build's by which code for `arch` is made."""
    default = build_support.cuda_architectures(build_support.known_architectures(nvcc))
    for flag in build_support.gencode_flags(default):
        source, codes = re.fullmatch(r"-gencode=arch=(\w+),code=\[(.*)\]", flag).groups()
        if f"sm_{arch}" in codes.split(","):
            return f"-gencode=arch={source},code=sm_{arch}"
    raise ValueError(f"nothing is built for sm_{arch} by default, but for {' '.join(default)}")


@functools.cache
def kernels(source: str, arch: int) -> dict[Instance, Binary]:
    """What a source compiles to, in bfloat16; nothing without nvcc."""
    nvcc = build_support.find_nvcc()
    if nvcc is None:
        return {}
    launch = f"template void launch_{source}<__nv_bfloat16>(const {SOURCES[source]}&, cudaStream_t);"
    lines = [f'#include "csrc/cuda/kernels/{source}.cuh"', f"namespace resnet_fused::cuda {{ {launch} }}"]
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = pathlib.Path(folder, "kernel.cu"), pathlib.Path(folder, "kernel.cubin")
        text.write_text("\n".join(lines) + "\n")
        flags = [*build_support.KERNEL_FLAGS, as_built(nvcc, arch), "-cubin", f"-I{ROOT}"]
        subprocess.run([nvcc, *flags, str(text), "-o", str(cubin)], check=True)
        functions, usage = sass.functions(told(cubin, "-sass")), told(cubin, "-res-usage")
    found = {}
    for name, code in functions.items():
        instance = instance_of(name)
        if instance is None:
            continue
        used = usage.partition(f"{name}:")[2]
        registers, spilled = resources(used)
        shared, warps = STAGES * (instance.rows + instance.cols) * ROW_BYTES + BESIDE[source] * instance.cols, WARPS
        if instance == Instance():
            shared, warps = int(re.search(r"SHARED:(\d+)", used)[1]), MERGED["Channels"] * MERGED["Chunks"] // 32
        assert instance not in found, f"{name} is not told from another kernel"
        found[instance] = Binary(tuple(code), registers, shared, warps, STAGES, spilled)
    return found


def tile_of(outputs: int, pixels: int, whole: bool, sms: int) -> tuple[int, int]:
    """As `with_conv_shape` in conv_shapes.cuh chooses."""
    if not whole:
        return 128, 64
    if outputs > 64 and cdiv(pixels, 128) * cdiv(outputs, 128) >= sms:
        return 128, 128
    return (128, 64) if cdiv(pixels, 128) * cdiv(outputs, 64) >= sms else (64, 64)


def tiles_of_chunk(c: int, k: int, rows: int, tiles: int, sms: int) -> int:
    """As its namesake in conv1x1.cuh chooses."""
    enough = cdiv(50 * 24 * k, 2 * (c + k) * rows)
    return max(1, min(enough, tiles // (8 * sms)))


class Convolution:
    """The sizes of a call."""

    def __init__(self, call: Call) -> None:
        self.given = dict(zip((name for name, _ in call.arguments), call.args, strict=True))
        self.x, self.weight = self.given["x"], self.given["weight"]
        self.geometry = [tuple(self.given.get(name) or default) for name, default in GEOMETRY]
        self.n, self.k, self.p, self.q = output_shape(self.x.shape, self.weight.shape, *self.geometry)
        self.c, self.pixels = self.x.shape[1], self.n * self.p * self.q
        self.whole = self.c % CHUNK == self.k % CHUNK == 0
        self.moved = OPS[call.op].bytes(*call.args)

    def steps(self, weight) -> int:
        """Of the reduction over what `weight` meets: runs of whole filter rows, where taps are neighbours."""
        _, c, r, s = weight.shape
        runs, length = (r, s * c) if self.geometry[2][1] == 1 or s == 1 else (r * s, c)
        return cdiv(runs * cdiv(length, CHUNK) * CHUNK, STEP)

    def shape(self, tile: tuple[int, int], *more: str) -> str:
        """In a few words."""
        sizes = f"{'x'.join(map(str, self.x.shape[1:]))} to {self.k}, {self.weight.shape[2]}x{self.weight.shape[3]}"
        stride = f" by {self.geometry[0][0]}" if self.geometry[0] != (1, 1) else ""
        return f"{sizes}{stride}; {tile[0]}x{tile[1]}x{STEP}; {' '.join(more)}"


def start(name: str, source: str, arch: int, instance: Instance, of: Convolution, depths, moved: int, *more) -> Start:
    """A launch of products over these numbers of steps, one after the other."""
    tile = instance.rows, instance.cols
    trips = loop_trips.Trips(1, tuple(depths), step_flops=2 * tile[0] * tile[1] * STEP)
    tiles, binary = cdiv(of.pixels, tile[0]) * cdiv(of.k, tile[1]), kernels(source, arch)[instance]
    return Start(f"{name} (CUDA)", of.shape(tile, *more), binary, tiles, trips, moved)


def of_convolution(call: Call, card: Card) -> list[Start]:
    """Of the kernel of `conv_norm_add_relu`."""
    of = Convolution(call)
    instance = Instance(*tile_of(of.k, of.pixels, of.whole, card.sms), of.whole)
    adds = of.given.get("residual") is not None or of.given.get("adds", False)
    more = ["residual"] * bool(adds)
    depths = [of.steps(of.weight)]
    return [start(call.op.removesuffix("_"), "conv_norm_add_relu", card.arch, instance, of, depths, of.moved, *more)]


def of_values(call: Call, card: Card) -> list[Start]:
    """`conv_values`, by the kernel of `conv1x1`, and what merges the statistics of its chunks of rows."""
    of = Convolution(call)
    tile, norm = tile_of(of.k, of.pixels, of.whole, card.sms), of.given.get("x_scale") is not None
    instance = Instance(*tile, of.whole, norm)
    more, moved, merge = ["x_scale"] * norm, of.moved, []
    if of.given.get("emit_stats", True):
        down, across = cdiv(of.pixels, tile[0]), cdiv(of.k, tile[1])
        chunks = cdiv(down, tiles_of_chunk(of.c, of.k, tile[0], down * across, card.sms))
        partial, round_of_it = PARTIAL * chunks * of.k, PARTIAL * MERGED["Channels"] * MERGED["Chunks"]
        moved, binary = moved + partial, kernels("conv1x1", card.arch)[Instance()]
        trips = loop_trips.Trips(cdiv(chunks, MERGED["Chunks"]), step_bytes=round_of_it)
        programs, shape = cdiv(of.k, MERGED["Channels"]), f"{of.k} of {chunks}; {MERGED['Chunks']}; "
        merge.append(Start("merge_moments (CUDA)", shape, binary, programs, trips, partial))
        more.append("partial")
    depths = [of.steps(of.weight)]
    return [start("conv_values", "conv1x1", card.arch, instance, of, depths, moved, *more), *merge]


def of_join(call: Call, card: Card) -> list[Start]:
    """`conv1x1_join` in a chain, which makes its scales itself, with a projection."""
    of = Convolution(call)
    whole = of.whole and of.given["x2"].shape[1] % CHUNK == 0
    instance = Instance(128 if whole else 64, 64, whole, not whole, True)
    depths = [of.steps(weight) for weight in (of.weight, of.given["weight2"])]
    return [start("conv1x1_join", "conv1x1_join", card.arch, instance, of, depths, of.moved, "x2")]


STARTS = {
    "conv_join": of_convolution,
    "conv_norm_add_relu": of_convolution,
    "conv_norm_add_relu_": of_convolution,
    "conv_values": of_values,
}


def starts_of(call: Call, card: Card) -> list[Start] | None:
    """What a call starts by compiled kernels; None: others serve it. Nothing without nvcc."""
    of_chain = call.op == "conv1x1_join" and dict(call.arguments)["scale"] is None
    made = of_join if of_chain else STARTS.get(call.op)
    if made is None:
        return None
    return made(call, card) if build_support.find_nvcc() else []
