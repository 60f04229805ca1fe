"""What a program's node keeps from forward to backward, and which writes in between stop it.

Stock operations save some of a block's tensors and raise in backward where one of those was written to since. So does
the node, for the same tensors: the input and the weights that a convolution on the way of a gradient reads, batch
norm's weight, running statistics that it normalised with. Of everything else it keeps aliases, whose writes autograd
does not see: nothing that the first backward computes depends on them. A backward by stock operations does (see
:mod:`.replay`), and asks :func:`unmoved`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.contract import is_slice
from .program import Normalisation, Program
from .spec import StepTensors


class Recorder:
    """Turns nested lists and named tuples into the flat list that ``save_for_backward`` takes, and back."""

    def __init__(self, structure: object) -> None:
        self.flat: list[Tensor] = []
        self.shape = self._walk(structure)

    def _walk(self, item: object) -> object:
        """None for None, which is most of it; True for a tensor."""
        if item is None:
            return None
        if isinstance(item, Tensor):
            self.flat.append(item)
            return True
        children = [None if child is None else self._walk(child) for child in item]
        return children if type(item) is list else (type(item), children)

    @staticmethod
    def rebuild(shape: object, flat: Iterator[Tensor]) -> object:
        """The structure again; consumes `flat` from its front."""
        kind, children = (None, shape) if type(shape) is list else shape
        found = [  # calls of itself for none but structures: of one, a graph's tracing takes a millisecond
            None if child is None else next(flat) if child is True else Recorder.rebuild(child, flat)
            for child in children
        ]
        return found if kind is None else kind(*found)


class Source(NamedTuple):
    """What a node's output can be made of again, see :mod:`.remade`: what backward knows beside tensors, and these."""

    facts: object
    held: Sequence[Tensor | None]


def layouts_of(flat: list[Tensor | None]) -> tuple[bool, ...]:
    """Which of what is saved is channels_last, or some channels of such; empty where no hook packs it."""
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return ()
    return tuple(t is not None and t.dim() == 4 and is_slice(t) for t in flat)


def unpacked(tensors: Sequence[Tensor | None], layouts: tuple[bool, ...]) -> list[Tensor]:
    """What was saved, in layouts that kernels take: hooks (``save_on_cpu(pin_memory=True)``) may lose strides."""
    if not layouts:
        return list(tensors)
    found = zip(tensors, layouts, strict=True)
    return [t if not lasts or is_slice(t) else t.contiguous(memory_format=torch.channels_last) for t, lasts in found]


def counter_of(x: Tensor) -> Tensor:
    """A tensor that shares the version counter of `x`, and keeps nothing of its memory."""
    counter = x.detach()
    counter.data = x.new_empty(0)
    return counter


def version(t: Tensor) -> int:
    """How often `t` was written to; inference tensors do not count."""
    return 0 if t.is_inference() else t._version


def refuses_inference_tensors(tensors: list[StepTensors]) -> bool:
    """Whether some parameter or buffer was made in inference mode, where stock decides which of them it takes."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return any(t is not None and t.is_inference() for own in tensors for t in own)


def held(
    program: Program, tensors: list[StepTensors], wanted: list[bool], folded: set[int]
) -> tuple[list[StepTensors], list[int]]:
    """Of the tensors of nodes those that are saved as they are, as stock does, so that a write is noticed as there.

    That is, where a gradient passes: the weight of a convolution, the weight of a batch norm, and running statistics
    that it normalised with. Returned beside: which of ``flatten(tensors)`` are used and not saved. `wanted`: of each
    value. Of the convolutions `folded`, which were never written, the norm's gradients are made of weight and bias:
    where stock does not save these, a copy is held; so it is of running statistics through whose norm no gradient
    passes, by which ReLUs decide.
    """
    found, others, width = [], [], len(StepTensors._fields)
    for i, (node, own) in enumerate(zip(program.nodes, tensors, strict=True)):
        wants, frozen = wanted[i + program.inputs], isinstance(node, Normalisation) and not node.norm.batch_stats
        saves = (wants, False, wants, False, wants and frozen, wants and frozen)
        kept = [t if saved else None for t, saved in zip(own[:6], saves, strict=True)]
        if not torch.compiler.is_compiling():  # where its compiler decides what lives, and what writes to it
            used = own[:4] + (own[4:6] if frozen else (None, None))
            for j, (t, there) in enumerate(zip(used, kept, strict=True)):
                if t is not None and there is None:
                    others.append(i * width + j)
            if frozen and not wants and own.num_batches_tracked is not None:
                kept[4:6] = [t.clone() for t in own[4:6]]
        if i + program.inputs in folded:
            kept[:2] = [t if there is t else t.detach().clone() for t, there in zip(own[:2], kept[:2], strict=True)]
        found.append(StepTensors(*kept))
    return found, others


def unmoved(given: Iterable[Tensor], versions: Iterable[int]) -> None:
    """Refuse what was written to since forward, of what a node keeps beside what is saved.

    Raises:
        RuntimeError: one was.
    """
    for t, before in zip(given, versions, strict=True):
        if version(t) != before:
            raise RuntimeError(
                f"a bias, or another tensor of shape {list(t.shape)} that a fused block need not save, was "
                "modified by an inplace operation between its forward and a backward that runs it again "
                "(create_graph=True or batched gradients); modify it after that backward"
            )
