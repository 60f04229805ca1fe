"""Stages in evaluation: a Sequential of fused blocks runs a large batch in pieces of a few images.

Images do not meet in a folded block, so a stage gives the same result piece by piece. It is worth it on the CPU, where
the C library maps every result of 32 MiB or more anew and its pages are faulted in again: more than half of a stock
training step of layer1.1 is system time (benchmarks/results/2026-11-24-epyc-avx512-2core-block-variants.md). Smaller
results can reuse memory that is there. Only the stage's own output is large, and lies in huge pages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .. import library
from ..backends import bounds
from ..blocks import norms
from ..blocks.site import Site, conv_geometry, input_obstacle
from ..ops.conv_add_relu import output_shape
from . import swap
from .fused_module import FusedModule, is_stock_forced, obstacle, sites_of
from .swap import STATE, is_fused

Tensor = torch.Tensor
#: Bytes from which glibc maps an allocation anew, and the most that a result within a piece may have.
MAPPED, PIECE = 32 << 20, 25 << 20


class Extent(NamedTuple):
    """What a block makes of an input: elements an image of its largest result, and the shape of its last."""

    largest: int
    shape: tuple[int, ...]


def _extent(site: Site, shape: tuple[int, ...]) -> Extent | None:
    """The extent of a chain; None where images meet, in batch statistics."""
    if any(norms.settings(norm).batch_stats for _, norm in site.pairs):
        return None
    largest, h = 0, shape
    for conv, _ in site.steps:
        geometry = conv_geometry(conv)
        h = output_shape(h, conv.weight.shape, geometry.stride, geometry.padding, geometry.dilation)
        largest = max(largest, h[1] * h[2] * h[3])
    return Extent(largest, h)


def _stage_extent(stage: nn.Sequential, shape: tuple[int, ...]) -> Extent | None:
    """The extent of a whole stage; None unless each block is one chain, would run it now, and has no hooks."""
    largest = 0
    for block in stage:
        if not is_fused(block, FusedModule) or block._forward_hooks or block._forward_pre_hooks:
            return None
        state = block.__dict__[STATE]
        sites = sites_of(block, state)
        if len(state.program.calls) != 1 or len(sites) != 1 or obstacle(block, state, sites):
            return None
        extent = _extent(sites[0], shape)
        if extent is None:
            return None
        largest, shape = max(largest, extent.largest), extent.shape
    return Extent(largest, shape)


def images_in_piece(stage: nn.Sequential, x: object) -> int:
    """How many images to run at a time; 0: all at once, as stock."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor or is_stock_forced():
        return 0
    if x.device.type != "cpu" or x.dim() != 4 or x.shape[0] < 2 or not library.status().cpu.loaded:
        return 0
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in stage.parameters())):
        return 0
    if any(getattr(torch_module, name) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")):
        return 0
    extent = _stage_extent(stage, tuple(x.shape)) if len(stage) else None
    if extent is None or extent.largest * x.element_size() * x.shape[0] < MAPPED:
        return 0
    first = stage[0]
    if input_obstacle(x, sites_of(first, first.__dict__[STATE])[0]):
        return 0
    return max(1, PIECE // (extent.largest * x.element_size()))


class _Stage(swap.Swapped):
    """Mixin of ``nn.Sequential`` that runs a large batch in pieces where that changes nothing but the time."""

    def forward(self, x):
        images = images_in_piece(self, x) if is_fused(self) and not self._resnet_fused_replaced("forward") else 0
        if not 0 < images < x.shape[0]:
            return super().forward(x)
        out, bound = None, 0.0
        for begin in range(0, x.shape[0], images):
            piece = super().forward(x[begin : begin + images])
            if out is None:
                out = torch.ops.resnet_fused.new_batch(piece, x.shape[0])
            out[begin : begin + images].copy_(piece)
            bound = max(bound, bounds.of(piece) if bounds.is_known(piece) else math.inf)
        return bounds.remember(out, bound) if bound < bounds.SAFE else out


def _stage_class(_: type = nn.Sequential) -> type:
    return FusedStage


FusedStage = swap.subclass(_Stage, nn.Sequential, (_stage_class, ()))


def fuse_stage(module: nn.Module) -> bool:
    """Make a stage of `module` if it is a plain Sequential of fused blocks; whether it was."""
    if swap.stock_class(module) is not nn.Sequential or is_fused(module):
        return False
    if not len(module) or not all(is_fused(block, FusedModule) for block in module):
        return False
    return not swap.put(module, _stage_class, True)
