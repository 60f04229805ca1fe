"""Compile the models' Triton kernels in parallel, into Triton's cache on disk: later parts would do it one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

import resnet_fused

from .. import named
from .context import Context


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """The first model's step and evaluation, then the other models' steps."""
    first, *others = context.settings.models
    if not context.on_gpu:
        yield first, lambda: context.skip("compiles for the GPU at hand, and there is none", name=first)
        return
    for name, training in ((first, True), (first, False), *((name, True) for name in others)):
        mode = "training" if training else "evaluation"
        yield f"{name}, {mode}", functools.partial(compile_all, context, name, training)


def compile_all(context: Context, name: str, training: bool) -> None:
    """A row with what was compiled, and one for each kernel that does not compile."""
    settings = context.settings
    shape = (settings.batch, 3, settings.size, settings.size)
    model, example = named.build(name).train(training), torch.empty(shape, dtype=settings.dtype, device="meta")
    with torch.cuda.device(context.device):
        warmed = resnet_fused.warmup(model, example)
    context.row(name=name, kernels=warmed.kernels, compiled=warmed.compiled, seconds=warmed.seconds)
    for failure in warmed.failures:
        context.row("failed", name=name, reason=f"does not compile: {failure}")
