"""Compile the Triton kernels that a step starts, as a GPU would be given them, and disassemble them."""

from __future__ import annotations

import dataclasses
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

from resnet_fused.backends.triton import compile, trace

STRIDES = {"x_ptr": ("X_STRIDE_H", "X_STRIDE_W"), "x2_ptr": (), "a_ptr": ()}  # and else STRIDE_H and STRIDE_W


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
