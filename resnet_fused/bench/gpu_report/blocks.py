"""The distinct blocks of the first model on their activations: eager, fused, and torch.compile with max-autotune."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

import resnet_fused

from .. import memory, peers
from ..blocks import Block, distinct_blocks
from . import compiled, workload
from .context import Context

QUICK_BLOCKS = 2
FOUND_ON = 2  # images of the run that finds the blocks


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every block eager and fused, then compiled: compiling one takes as long as measuring all of these."""
    name = context.settings.models[0]
    models = workload.pair(context, name)
    names = [row.name for row in resnet_fused.report(models[peers.OURS]).fused]
    found = distinct_blocks(models[peers.STOCK], names, workload.images(context, FOUND_ON))
    found = sorted(found, key=lambda block: -block.alike * block.example.numel())
    found = found[: QUICK_BLOCKS if context.settings.quick else None]
    for block in found:
        yield f"{name} {block.name}", functools.partial(measure, context, models, block)
    for block in found:
        yield f"{name} {block.name}, compiled", functools.partial(with_compile, context, models, block)


def prepared(context: Context, models: dict[str, nn.Module], block: Block) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Both modules in training, an input of the report's batch, and a gradient of the output."""
    batch, dtype = context.settings.batch, context.settings.dtype
    pair = {peer: model.train().get_submodule(block.name) for peer, model in models.items()}
    rounds = -(-batch // len(block.example))
    x = block.example.repeat(rounds, 1, 1, 1)[:batch].contiguous(memory_format=torch.channels_last)
    x = (x + 0.1 * torch.randn_like(x)).to(dtype).requires_grad_()  # no image twice
    with torch.no_grad(), workload.autocast(context):
        out = pair[peers.STOCK](x)
    return pair, x, torch.randn_like(out)


def measure(context: Context, models: dict[str, nn.Module], block: Block) -> None:
    """Forward, backward and both; bytes kept."""
    pair, x, grad = prepared(context, models, block)
    used = {}
    for peer, module in pair.items():

        def forward(module=module) -> torch.Tensor:
            with workload.autocast(context):
                return module(x)

        used[peer] = {"saved_bytes": memory.saved_bytes(forward, module.parameters())}
    runs = {peer: workload.block_step(context, module, x, grad) for peer, module in pair.items()}
    label = block.label(context.settings.batch)
    workload.compare(context, label, runs, context.settings.batch, used, mode="training", used=block.alike)


def with_compile(context: Context, models: dict[str, nn.Module], block: Block) -> None:
    """Eager again, beside its compiled self."""
    label, batch = block.label(context.settings.batch), context.settings.batch
    if reason := compiled.obstacle(context):
        context.skip(reason, name=label, peer=compiled.PEER)
        return
    pair, x, grad = prepared(context, models, block)
    modules = {peers.STOCK: pair[peers.STOCK], compiled.PEER: compiled.of(copy.deepcopy(pair[peers.STOCK]))}
    runs = {peer: workload.block_step(context, module, x, grad) for peer, module in modules.items()}
    workload.compare(context, label, runs, batch, mode="training", used=block.alike)
