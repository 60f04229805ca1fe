"""Compile what a step starts, as a GPU would be given it, and disassemble it: Triton's kernels, nvcc's convolutions."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable

import loop_trips
import sass
import torch
import triton

import build_support
from resnet_fused.backends.triton import compile, trace
from resnet_fused.backends.triton.common import cdiv
from resnet_fused.ops.conv_add_relu import output_shape

ROOT = pathlib.Path(__file__).parent.parent
STRIDES = {"x_ptr": ("X_STRIDE_H", "X_STRIDE_W"), "x2_ptr": (), "a_ptr": ()}  # and else STRIDE_H and STRIDE_W
CONV_STAGES, CONV_STEP, CONV_WARPS = 3, 64, 8  # kStages, elements of 16 bits in kRowBytes, and kConvThreads / 32


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled kernel, and what a block of it takes of a multiprocessor."""

    code: tuple[sass.Instruction, ...]
    registers: int
    shared: int
    warps: int
    stages: int
    spilled: int  # bytes of stack and local memory of a thread


@dataclasses.dataclass(frozen=True)
class Start:
    """A launch of a binary."""

    kernel: str
    shape: str
    binary: Binary
    programs: int
    trips: loop_trips.Trips
    moved: int  # bytes: each tensor once
    due: int = 0  # FLOPs of its products, without padding


def cuobjdump() -> str:
    """The one that Triton ships, else the toolkit's."""
    own = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(own) if own.exists() else shutil.which("cuobjdump") or "cuobjdump"


def told(cubin: pathlib.Path, option: str) -> str:
    return subprocess.run([cuobjdump(), option, str(cubin)], capture_output=True, text=True, check=True).stdout


def resources(usage: str) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of the first function that cuobjdump tells of."""
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


# Of Triton ----------------------------------------------------------------------------------------------------------


def compile_together(launches: Iterable[trace.Launch], arch: int) -> None:
    """Into Triton's cache, by a process for each core."""
    failed = [done for done in compile.compile_all(launches, arch) if done.error]
    if failed:
        raise RuntimeError(f"{failed[0].kernel} does not compile: {failed[0].error}")


_of_triton: dict[tuple, Binary] = {}


def of_triton(launch: trace.Launch, arch: int) -> Binary:
    """The binary of a launch, from Triton's cache if it is there."""
    key = arch, launch.binary
    if key not in _of_triton:
        job = compile.job(launch, arch)
        triton.runtime.driver.set_active(compile.NamesItsTarget(arch))
        kernel = getattr(importlib.import_module(job.module), job.kernel)
        built = kernel.warmup(**job.values, **job.options, grid=(1,))
        with tempfile.TemporaryDirectory() as folder:
            cubin = pathlib.Path(folder, "kernel.cubin")
            cubin.write_bytes(built.asm["cubin"])
            code = next(iter(sass.functions(told(cubin, "-sass")).values()))
            registers, spilled = resources(told(cubin, "-res-usage"))
        warps, stages = job.options["num_warps"], job.options["num_stages"]
        _of_triton[key] = Binary(tuple(code), registers, built.metadata.shared, warps, stages, spilled)
    return _of_triton[key]


def start_of(launch: trace.Launch, arch: int) -> Start:
    name, values = launch.kernel.fn.__name__, launch.values
    moved = bytes_of(values)
    trips = loop_trips.of_triton(name, values, moved, launch.programs)
    return Start(name, shape_of(values), of_triton(launch, arch), launch.programs, trips, moved)


def bytes_of(values: dict) -> int:
    """Of a launch's tensors, each once; of one that is read at a stride, the pixels that are."""
    total = 0
    for name, t in values.items():
        if not isinstance(t, torch.Tensor):
            continue
        steps = [values.get(step) for step in STRIDES.get(name, ())] if name in STRIDES else [1, 1]
        if name in STRIDES and (not steps or steps[0] is None):
            steps = [values.get("STRIDE_H") or 1, values.get("STRIDE_W") or 1]
        total += t.numel() * t.element_size() // (steps[0] * steps[1])
    return total


def shape_of(values: dict) -> str:
    """Its tensors' sizes and what tells binaries apart, in a few words."""
    data = [t for t in values.values() if isinstance(t, torch.Tensor) and t.dim() == 4]
    tile = "x".join(str(values[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C") if name in values)
    sizes = "x".join(map(str, data[0].shape[1:])) if data else ""
    wide = {t.shape[1] for t in data[1:]} - {data[0].shape[1] if data else 0}
    others = "/".join(map(str, sorted(wide)))
    given = [
        name.removesuffix("_ptr") for name in OPTIONS if values.get(f"{name.removesuffix('_ptr')}_ptr") is not None
    ]
    return f"{sizes}{' and ' + others if others else ''}; {tile}; {' '.join(given)}"


OPTIONS = ("z", "mask", "factor", "x_scale", "coupling", "residual", "residual_mask", "x2", "partial", "splits")


# Of nvcc ------------------------------------------------------------------------------------------------------------


@functools.cache
def convolutions(arch: int) -> dict[str, Binary]:
    """The compiled convolutions in bfloat16 by "ROWSxCOLS" and whether chunks are copied; none without nvcc."""
    nvcc = build_support.find_nvcc()
    if nvcc is None:
        return {}
    source = '#include "csrc/cuda/kernels/conv_norm_add_relu.cuh"\nnamespace resnet_fused::cuda {\n'
    source += "template void launch_conv_norm_add_relu<__nv_bfloat16>(const ConvNormAddReluParams&, cudaStream_t);\n}\n"
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = pathlib.Path(folder, "conv.cu"), pathlib.Path(folder, "conv.cubin")
        text.write_text(source)
        command = [nvcc, "-std=c++20", "-O3", f"-I{ROOT}", "-cubin", f"-arch=sm_{arch}", str(text), "-o", str(cubin)]
        subprocess.run(command, check=True)
        functions, usage = sass.functions(told(cubin, "-sass")), told(cubin, "-res-usage")
    found = {}
    for name, code in functions.items():
        if not (shape := re.search(r"TileShapeILi(\d+)ELi(\d+)E\w*ELb([01])E", name)):
            continue
        rows, cols, vectors = shape.groups()
        registers, spilled = resources(usage.partition(f"{name}:")[2])
        shared = CONV_STAGES * (int(rows) + int(cols)) * 128 + 8 * int(cols)
        found[f"{rows}x{cols} {vectors}"] = Binary(tuple(code), registers, shared, CONV_WARPS, CONV_STAGES, spilled)
    return found


def tile_of(outputs: int, pixels: int, whole: bool, sms: int) -> tuple[int, int]:
    """As `with_conv_shape` in csrc/cuda/kernels/conv_shapes.cuh chooses for 16 bits."""
    if not whole:
        return 128, 64
    if outputs > 64 and cdiv(pixels, 128) * cdiv(outputs, 128) >= sms:
        return 128, 128
    return (128, 64) if cdiv(pixels, 128) * cdiv(outputs, 64) >= sms else (64, 64)


def start_of_convolution(call, arch: int, sms: int) -> Start | None:
    """A call of `conv_norm_add_relu` or `conv_norm_add_relu_`; None without nvcc."""
    given = dict(zip((name for name, _ in call.arguments), call.args, strict=True))
    x, weight = given["x"], given["weight"]
    stride, padding, dilation = (given.get(name) or default for name, default in GEOMETRY)
    n, k, p, q = output_shape(x.shape, weight.shape, stride, padding, dilation)
    whole = x.shape[1] % 8 == k % 8 == 0
    rows, cols = tile_of(k, n * p * q, whole, sms)
    binary = convolutions(arch).get(f"{rows}x{cols} {int(whole)}")
    if binary is None:
        return None
    taps = weight.shape[2] * weight.shape[3]
    depth = taps * (cdiv(x.shape[1], 8) * 8 if whole else x.shape[1])
    trips = loop_trips.Trips(1, (cdiv(depth, CONV_STEP),), step_flops=2 * rows * cols * CONV_STEP)
    tiles = cdiv(n * p * q, rows) * cdiv(k, cols)
    size, used = x.element_size(), min(1, taps / (stride[0] * stride[1]))
    results = n * k * p * q * (1 + (given.get("residual") is not None or bool(given.get("adds"))))
    moved = int(size * (x.numel() * used + weight.numel() + results))
    shape = f"{'x'.join(map(str, x.shape[1:]))} to {k}, {weight.shape[2]}x{weight.shape[3]}; {rows}x{cols}x{CONV_STEP}"
    return Start("conv_norm_add_relu (CUDA)", shape, binary, tiles, trips, moved, 2 * n * k * p * q * taps * x.shape[1])


GEOMETRY = (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))
