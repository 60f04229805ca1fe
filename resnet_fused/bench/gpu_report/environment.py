"""Where the rows come from: versions, device, clocks, backends; and the two ceilings that rows are held against."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator

import torch

from ...backends import backends
from ...plan import devices
from .. import records
from . import measure
from .context import Context

#: What nvidia-smi is asked for.
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")
MATRIX = 8192  # rows and columns of the products that show the ceiling of arithmetic


def nvidia_smi(device: torch.device, *fields: str) -> dict[str, str]:
    """What the driver says of `device`; empty where nobody tells."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return {}
    which = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = ["-i", f"GPU-{which}"] if which else []
    command = ["nvidia-smi", *chosen, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (cell.strip() for cell in done.stdout.strip().split("\n")[0].split(",")), strict=False))


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature now; of a CPU the load."""
    return nvidia_smi(device, *CLOCKS) or {"load": records.provenance(device)["load"]}


def device_facts(device: torch.device) -> dict[str, str]:
    """What every row carries."""
    if device.type != "cuda":
        return {"device": records.device_name(device), "capability": ""}
    major, minor = torch.cuda.get_device_capability(device)
    return {"device": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}


def provenance(context: Context) -> dict[str, object]:
    """What is the same for all rows: machine, versions, revision, settings."""
    asked = context.settings
    settings = {"models": " ".join(asked.models), "batch": asked.batch, "size": asked.size, "quick": asked.quick}
    found: dict[str, object] = dict(records.provenance(context.device, **settings))
    found |= device_facts(context.device)
    found |= {"dtype": str(context.settings.dtype).removeprefix("torch."), "platform": platform.platform()}
    found |= {"cuda": torch.version.cuda or "none", "cudnn": str(torch.backends.cudnn.version() or "none")}
    found |= {"driver": nvidia_smi(context.device, "driver_version").get("driver_version", "unknown")}
    return found


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """Facts first, then the ceilings."""
    yield "backends", lambda: who_serves(context)
    yield "device", lambda: cost_model(context)
    yield "device copy", lambda: measure.copy_row(context)
    yield "matrix products", lambda: products(context)


def who_serves(context: Context) -> None:
    for name, backend in backends().items():
        context.row(name=name, serves=backend.unavailable or "available", ops=len(backend.kernels))


def cost_model(context: Context) -> None:
    """The figures that predictions in other rows are made with, and what the driver says of the same device."""
    known = devices.of(context.device)
    told = {}
    if context.on_gpu:
        properties = torch.cuda.get_device_properties(context.device)
        names = ("multi_processor_count", "L2_cache_size", "total_memory", "clock_rate", "memory_clock_rate")
        told = {name: getattr(properties, name) for name in (*names, "memory_bus_width") if hasattr(properties, name)}
    context.row(name="cost model", figures=dataclasses.asdict(known), told=told)


def products(context: Context) -> None:
    """Large products through PyTorch's library, on random numbers."""
    n = MATRIX if context.on_gpu else 512
    kinds = {"bfloat16": (torch.bfloat16, False), "float32": (torch.float32, False)}
    kinds |= {"float32 as TF32": (torch.float32, True)} if context.on_gpu else {}
    for name, (dtype, tf32) in kinds.items():
        a, b = (torch.randn(n, n, device=context.device).to(dtype) for _ in range(2))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            timing = measure.time_calls([lambda a=a, b=b: a @ b], context.device, context.settings.quick)
        finally:
            torch.set_float32_matmul_precision(before)
        rate = 2 * n**3 / (timing.median * 1e-3)
        context.row(name=f"matrix product, {name}", shape=[n, n, n], flops=2 * n**3, tflops=rate / 1e12, **timing.row())
