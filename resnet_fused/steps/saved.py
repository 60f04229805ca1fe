"""What a chain's node keeps from forward to backward, and which writes in between stop it.

Stock operations save some of a chain's tensors and raise in backward where one of those was written to since. So does
the node, for the same tensors: the input and the weights that a convolution on the way of a gradient reads, batch
norm's weight, running statistics that it normalised with. Of everything else it keeps aliases, whose writes autograd
does not see: nothing that the first backward computes depends on them. A backward by stock operations does (see
:mod:`.replay`), and takes them from :func:`originals`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import Chain, Lazy, StepTensors, flatten, join, lazy_join

Tensor = torch.Tensor


class Saved(NamedTuple):
    """What a chain's backward reads."""

    x: Tensor
    given: Tensor | None  # without elements; counts the writes to what `x` is a copy of
    sample_factor: Tensor | None
    out: Tensor | None  # the ReLU's mask; None where it can be recomputed
    written: Tensor | None  # without elements; counts the writes to a ReLU's result that is not saved itself
    tensors: list[StepTensors]
    inner: list[Lazy]  # one for each step but the last
    join: join.JoinState | lazy_join.LazyJoinState


class Recorder:
    """Turns nested named tuples into the flat list that ``save_for_backward`` takes, and back."""

    def __init__(self, structure: object) -> None:
        self.flat: list[Tensor | None] = []
        self.shape = self._walk(structure)

    def _walk(self, item: object) -> object:
        if item is None or isinstance(item, torch.Tensor):
            self.flat.append(item)
            return None
        if isinstance(item, list):
            return [self._walk(child) for child in item]
        return type(item), [self._walk(child) for child in item]

    @staticmethod
    def rebuild(shape: object, flat: list[Tensor | None]) -> object:
        """The structure again; consumes `flat` from its front."""
        if shape is None:
            return flat.pop(0)
        if isinstance(shape, list):
            return [Recorder.rebuild(child, flat) for child in shape]
        kind, children = shape
        return kind(*(Recorder.rebuild(child, flat) for child in children))


def layouts_of(flat: list[Tensor | None]) -> tuple[bool, ...]:
    """Which of what is saved is channels_last; empty where it comes back as it is, since no hook packs it."""
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return ()
    channels_last = torch.channels_last
    return tuple(t is not None and t.dim() == 4 and t.is_contiguous(memory_format=channels_last) for t in flat)


def unpacked(tensors: tuple[Tensor | None, ...], layouts: tuple[bool, ...]) -> list[Tensor | None]:
    """What was saved, in the layouts that kernels want: hooks (``save_on_cpu(pin_memory=True)``) may lose strides."""
    if not layouts:
        return list(tensors)
    found = zip(tensors, layouts, strict=True)
    return [t.contiguous(memory_format=torch.channels_last) if lasts else t for t, lasts in found]


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


class Alias(NamedTuple):
    """A tensor that was kept as an alias: its place among ``[x, *flatten(tensors)]``, and its version then."""

    place: int
    original: Tensor
    version: int


class Kept(NamedTuple):
    """The tensors of a chain as its node keeps them."""

    x: Tensor
    given: Tensor | None
    tensors: list[StepTensors]
    aliased: tuple[Alias, ...]


def keep(
    chain: Chain,
    x: Tensor,
    given: Tensor | None,
    tensors: list[StepTensors],
    needs: list[tuple[bool, ...]],
    needs_x: bool,
) -> Kept:
    """Alias those of `x` and `tensors` that stock would not save. `needs`: of each step, as in :class:`StepGrads`."""
    kept, aliased, reached, last = [], [], needs_x, len(chain.steps) - 1
    width = len(StepTensors._fields)

    def alias(t: Tensor | None, place: int, clone: bool = False) -> Tensor | None:
        if t is None:
            return None
        aliased.append(Alias(place, t, version(t)))
        return t.detach().clone() if clone else t.data

    for i, (step, own, need) in enumerate(zip(chain.all_steps, tensors, needs, strict=True)):
        unwritten = chain.lazy or (chain.gram_shortcut if i > last else chain.gram and i == last)
        convolved = (needs_x if i > last else reached) or need[0] or need[1]
        normed = convolved or need[2] or need[3]
        if i <= last:
            reached = normed
        frozen, place = not step.norm.batch_stats, 1 + i * width
        kept.append(
            StepTensors(
                # a join that never wrote its convolution's output reads the weight again, and where frozen the bias
                own.weight if convolved or (unwritten and normed) else alias(own.weight, place),
                alias(own.bias, place + 1, clone=unwritten and frozen),
                own.gamma if normed else alias(own.gamma, place + 2),
                alias(own.beta, place + 3),
                *((own.running_mean, own.running_var) if frozen else (None, None)),
            )
        )
    reads_x = needs_x or any(need[0] or need[1] for need in (needs[0], *needs[last + 1 :]))
    if not reads_x:
        given = None
        if not (chain.lazy or chain.gram_shortcut or (chain.gram and last == 0)):
            x = alias(x, 0)
    return Kept(x, given, kept, tuple(aliased))


def originals(x: Tensor, tensors: list[StepTensors], aliased: tuple[Alias, ...]) -> list[Tensor | None]:
    """``[x, *flatten(tensors)]`` as autograd knows them, for a backward by stock operations.

    Raises:
        RuntimeError: one was written to since forward.
    """
    flat = [x, *flatten(tensors)]
    for place, original, before in aliased:
        if version(original) != before:
            raise RuntimeError(
                f"a bias, or another tensor of shape {list(original.shape)} that a fused block need not save, was "
                "modified by an inplace operation between its forward and a backward that runs it again "
                "(create_graph=True or batched gradients); modify it after that backward"
            )
        flat[place] = original
    return flat
