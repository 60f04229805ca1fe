"""``warmup``: compile every Triton kernel that a step of a model starts, in parallel, before the step."""

from __future__ import annotations

import argparse
import contextlib

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import resnet_fused

from ..bench import named
from ..bench.errors import Refused
from ..bench.options import DTYPES, device_of
from ..plan import devices
from . import GPU_BATCH


def run(options: argparse.Namespace) -> int:
    """Print what was compiled; 1 where a kernel does not compile."""
    where, capability = target(options)
    model = named.build(options.model).train(not options.eval)
    size = options.size or named.input_size(model)
    example = torch.empty(options.batch or GPU_BATCH, 3, size, size, dtype=DTYPES[options.dtype], device="meta")
    named.require_taken(model, example.shape)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with where, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("planning", total=None)

        def tell(done, total: int) -> None:
            progress.update(task, total=total, advance=1, description=done.kernel)

        try:
            warmed = resnet_fused.warmup(model, example, capability=capability, workers=options.workers, tell=tell)
        except RuntimeError as error:
            raise Refused(str(error).removeprefix("warmup: ").replace("capability, e.g. 90,", CAPABILITY)) from None
    print(warmed)
    return 1 if warmed.failures else 0


def target(options: argparse.Namespace) -> tuple[contextlib.AbstractContextManager, int | None]:
    """What makes the GPU asked for the current one, or the capability of one that is elsewhere.

    Raises:
        Refused: the two options do not go together, or no GPU is asked for.
    """
    name, capability = options.device, options.device_capability
    if name and capability:
        raise Refused("--device and --device-capability both say what to compile for; pass one")
    with contextlib.suppress(ValueError):
        major, minor = devices.find(name).capability
        return contextlib.nullcontext(), 10 * major + minor
    if not name:
        return contextlib.nullcontext(), capability
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Refused(f"there is no GPU; pass {CAPABILITY} to compile for one that is elsewhere")
    device = device_of(name, tuple(devices.DEVICES))
    if device.type != "cuda":
        raise Refused(f"Triton's kernels are not for {name}; pass a GPU, or {CAPABILITY} for one that is elsewhere")
    return torch.cuda.device(device), None


CAPABILITY = "--device-capability, e.g. 9.0,"
