"""``warmup``: compile every Triton kernel that a step of a model starts, in parallel, before the step."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import resnet_fused

from ..bench import named
from ..bench.errors import Refused

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def run(options: argparse.Namespace) -> int:
    """Print what was compiled; 1 where a kernel does not compile."""
    model = named.build(options.model).train(not options.eval)
    size = options.size or named.input_size(model)
    example = torch.empty(options.batch, 3, size, size, dtype=DTYPES[options.dtype], device="meta")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("planning", total=None)

        def tell(done, total: int) -> None:
            progress.update(task, total=total, advance=1, description=done.kernel)

        try:
            warmed = resnet_fused.warmup(
                model, example, capability=options.device_capability, workers=options.workers, tell=tell
            )
        except RuntimeError as error:
            raise Refused(str(error).removeprefix("warmup: ").replace("capability, e.g. 90,", CAPABILITY)) from None
    print(warmed)
    return 1 if warmed.failures else 0


CAPABILITY = "--device-capability, e.g. 9.0,"
