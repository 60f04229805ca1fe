"""Stages: a Sequential of fused blocks passes values on in channels_last, and a large batch in pieces of a few images.

Between the blocks values are nobody else's: they stay in channels_last whatever stock's layout is, and bounds of them
(:mod:`..backends.bounds`) can be trusted. What leaves the stage is in stock's layout again.

In evaluation images do not meet in a folded block, so a stage gives the same result piece by piece. It is worth it on
the CPU, where the C library maps every result of 32 MiB or more anew and its pages are faulted in again: more than half
of a stock training step of layer1.1 is system time
(benchmarks/results/epyc-avx512-2core/runs.jsonl:5). Smaller results can reuse memory that is there, and stay in cache.
Only the stage's own output is large, and lies in huge pages; the last program of a piece writes its images straight
into it where its last step can, else they are copied.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import library
from ..backends import bounds
from ..blocks import drop_paths, runtime
from ..blocks.layers import globally_hooked
from ..ops.contract import is_channels_last
from ..steps.layout import Placed, left
from ..steps.program import Pooling
from . import as_stock, settled_stage, swap
from .forced import is_stock_forced
from .fused_module import FusedModule, Running, entry_obstacle, is_entered, placed, run_block, runnable
from .swap import is_fused

#: Bytes from which glibc maps an allocation anew, and the most that a result within a piece may have. ResNet-50 at
#: batch 32 took 16.5 ms an image with 10 to 13 MiB and 17.1 with 25 (two threads of a Zen 5, whose last-level cache
#: holds 32 MiB: what a block reads and what it writes).
MAPPED, PIECE = 32 << 20, 12 << 20
#: The same for a stage whose weights are less than half of such a piece, as an image's largest result is, from the
#: first to the second size of the whole: what a piece is made of stays near the cores, and reading its weights again
#: costs less than that saves. ResNet-18 at batch 8 took 53.4 ms, 56.3 in one piece, but at batch 32, if done there,
#: 203.6 and 195.2 (benchmarks/results/epyc-zen5-2core/runs.jsonl:32 and the next, of benchmarks/stage_pieces.py).
NEAR = 6 << 20, 12 << 20, 13 << 18


#: What of a stage is known to run in stock operations: some of its blocks, which need no proof.
_IN_PART = "in part"


def _entries(blocks: Iterable[nn.Module]) -> list[Running] | None:
    """What each block runs, where nothing but programs would run in all of them; else None."""
    entries = []
    for block in blocks:
        found = runnable(block) if is_entered(block) else None
        if found is None or len(found.sites) < len(found.form.calls):
            return None
        entries.append(found)
    return entries


#: By stage, the block from which on all run nothing but programs.
_tails: weakref.WeakKeyDictionary[nn.Sequential, int] = weakref.WeakKeyDictionary()


def _tail_of(stage: nn.Sequential, known: bool) -> int:
    """Where such blocks begin, or behind the last; in a graph too, and while a hook must see one of them.

    `known`: that it was asked, and nothing is new.
    """
    if torch.compiler.is_compiling() or not all(map(is_entered, stage)):
        return len(stage)
    if not known or stage not in _tails:
        alone = [i for i, block in enumerate(stage) if _entries([block]) is None]
        _tails[stage] = alone[-1] + 1 if alone else len(stage)
    return _tails[stage]


def _one_by_one(stage: nn.Sequential, x: Tensor, known: bool) -> Tensor:
    """The output where somebody else's code runs in some of the blocks, and may change others; or stock's."""
    out, tail = x, _tail_of(stage, known)
    for i, block in enumerate(stage):
        if i == tail:
            value = placed(out)
            done = settled_stage.output(stage, value.value, i, value.owned) if value.channels_last else None
            if done is None:
                done = settled_stage.settle(stage, lambda: _entries([*stage][tail:]), value, i)
            if done is not None:
                return done
        if is_entered(block):
            out = run_block(block, out, block)
        else:
            runtime.count_hindered()
            out = block(left(out))
    return left(out)


def _note_mixed(stage: nn.Sequential, x: Tensor, before: as_stock.Ran) -> None:
    """Note what is known of a stage, after it ran, of which a block, as it is traced, runs other code than programs.

    Unlike hooks and what else keeps a program from running, that stays.
    """
    found = [running for block in stage if is_entered(block) and (running := runnable(block)) is not None]
    if all(len(running.sites) == len(running.form.calls) for running in found):
        return
    sites = [site for running in found for site in running.sites]
    if not as_stock.note(stage, sites, x, before):
        as_stock.keep(stage, sites, x, _IN_PART)


def _all_images(entries: list[Running], x: Tensor) -> object:
    return functools.reduce(lambda value, entry: run_block(entry.block, value, entry.block, entry), entries, x)


def _sizes(entries: list[Running], shape: torch.Size) -> tuple[int, int]:
    """Elements an image of the largest result in a stage, and of all its weights; 0 where it must run whole.

    As modules that are unchanged have the same, what was found of each block is kept with them.
    """
    largest = weights = 0
    for entry in entries:
        kept = entry.sites[0].kept.unchanged
        found = kept.sizes.get(shape) if kept else None
        if found is None:
            found = _sizes_of(entry, shape)
            if kept:
                kept.sizes[shape] = found
        if not found:
            return 0, 0
        of_block, own, shape = found
        largest, weights = max(largest, of_block), weights + own
    return largest, weights


def _sizes_of(entry: Running, shape: torch.Size) -> tuple[int, int, torch.Size] | tuple[()]:
    """The same of a block, and the shape of its output.

    Nothing where it is more than one program, where images meet, in batch statistics, where a pool is called, and where
    a drop path draws, which stock does once for all images.
    """
    program, tensors = runtime.read(entry.sites[0])
    if drop_paths.draws(entry.sites[0].drop_path):
        return ()
    if not entry.form.is_whole or program.batch_stats or program.nodes[-1] == Pooling(program.output - 1, None):
        return ()
    made = program.shapes(shape, tensors)[program.inputs :]
    weights = sum(own.weight.numel() for own in tensors if own.weight is not None)
    return max(of[1:].numel() for of in made), weights, made[-1]


def images_in_piece(entries: list[Running], x: Tensor) -> int:
    """How many images to run at a time; 0: all at once, as stock."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not entries:
        return 0
    grads = torch.is_grad_enabled()
    if not x.is_cpu or x.dim() != 4 or x.shape[0] < 2 or (grads and x.requires_grad):
        return 0
    if not library.status().cpu.loaded:
        return 0
    if grads and any(p.requires_grad for e in entries for p in e.block.parameters()):
        return 0
    image, weights = (elements * x.element_size() for elements in _sizes(entries, x.shape))
    whole, (least, most, near) = image * x.shape[0], NEAR
    is_near = least <= whole <= most and 2 * max(image, weights) <= near
    if not (is_near or whole >= MAPPED) or entry_obstacle(x, entries[0]):
        return 0
    return max(1, (near if is_near else PIECE) // image)


def _in_pieces(entries: list[Running], x: Tensor, images: int) -> Tensor:
    piece = placed(_all_images(entries, x[:images]))
    out = _new_batch(piece, x.shape[0])
    out[:images].copy_(piece.value)
    *before, last = entries
    for begin in range(images, x.shape[0], images):
        value, into = placed(_all_images(before, x[begin : begin + images])), out[begin : begin + images]
        if is_channels_last(into):
            value = value._replace(into=into)
        piece = placed(run_block(last.block, value, last.block, last))
        if piece.value is not into:
            into.copy_(piece.value)
    return out


def _new_batch(piece: Placed, images: int) -> Tensor:
    """Memory for the results of all pieces, in stock's layout: channels_last, or the same with its sides renamed."""
    if piece.channels_last:
        return torch.ops.resnet_fused.new_batch(piece.value, images)
    like = piece.value.new_empty(1, *piece.value.shape[1:]).permute(0, 3, 1, 2)
    return torch.ops.resnet_fused.new_batch(like, images).permute(0, 2, 3, 1)


def run_stage(stage: nn.Sequential, x: Tensor) -> object:
    """The output of a stage of fused blocks, in stock's layout."""
    known, before = as_stock.is_known(stage, x, _IN_PART), as_stock.so_far()
    entries = None if known else _entries(stage)
    if entries is None:
        out = _one_by_one(stage, x, known)
        if not (known or torch.compiler.is_compiling()):
            _note_mixed(stage, x, before)
        return out
    if torch.compiler.is_compiling():
        return left(_all_images(entries, x))
    images = images_in_piece(entries, x)
    in_pieces = 0 < images < x.shape[0]
    may_settle = type(x) is Tensor and not in_pieces
    if may_settle and (out := settled_stage.settle(stage, lambda: entries, placed(x))) is not None:
        return out
    with bounds.private():
        if in_pieces:
            return _in_pieces(entries, x, images)
        out = left(_all_images(entries, x))
    sites = [site for entry in entries for site in entry.sites]
    ran = before.since()
    if not as_stock.note(stage, sites, x, before) and ran.fused < len(sites) and not ran.hindered:
        as_stock.keep(stage, sites, x, _IN_PART)
    return out


class _Stage(swap.Swapped):
    """Mixin of ``nn.Sequential`` that keeps what passes between its fused blocks to itself."""

    def forward(self, x):
        if as_stock.is_within():
            return super().forward(x)
        if not is_fused(self) or type(self) is not FusedStage or self._resnet_fused_replaced("forward"):
            return super().forward(x)
        traced = not isinstance(x, Tensor) or torch.jit.is_tracing() or torch.compiler.is_exporting()
        if is_stock_forced() or globally_hooked() or traced:
            return super().forward(x)
        if (out := settled_stage.output(self, x)) is not None:
            return out
        if as_stock.is_known(self, x):
            return as_stock.run(super().forward, x)
        return run_stage(self, x)


def _stage_class(_: type = nn.Sequential) -> type:
    return FusedStage


FusedStage = swap.subclass(_Stage, nn.Sequential, (_stage_class, ()))


def fuse_stage(module: nn.Module) -> None:
    """Make a stage of `module` if it is a plain Sequential of fused blocks."""
    plain = swap.stock_class(module) is nn.Sequential and not is_fused(module)
    if plain and len(module) and all(is_fused(block, FusedModule) for block in module):
        swap.put(module, _stage_class, True)
