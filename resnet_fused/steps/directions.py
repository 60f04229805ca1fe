"""The two directions of a lowered program, as functions of flat lists of tensors: over its steps, and back over them.

Forward saves the block's input, the raw tensor of every norm with a few numbers a channel, and of an output that a ReLU
clamped its mask: itself, which the next block saves anyway, or bits. Activations are written for the convolutions that
read them, and again on the way back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import replay
from .conv import channels_last
from .flow import Backward, Forward
from .kinds import Kind
from .layout import restrided
from .lazy import Lazy, Pending, Value
from .program import Addition, Convolution, Normalisation, Program
from .running import update_running_all
from .saved import Recorder, held
from .spec import Places, StepGrads, StepTensors, regroup, spread


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program and how it runs: its steps, in order; None: by stock's operations."""

    program: Program
    steps: tuple[Kind, ...] | None
    in_place: bool = True  # whether gradients are written over others: where there is an op that does
    remakes: bool = False  # whether who alone reads the output, and can make it again, does: see `remade`


def _kept(program: Program, f: Forward, folded: set[int]) -> list[Value | None]:
    """Of the values, those that backward reads: what norms made, what convolutions read, what a ReLU clamped.

    Only where a gradient passes. A sum's ReLU may have left bits in its place. Of the convolutions `folded`,
    also where it passes the norm alone: there an input is a copy, since stock has not saved that.
    """
    if program.dense:  # the output is what norms and convolutions read, the input is in it
        return [None, *f.values[1:-1], f.values[-1] if f.wanted[-1] else None]
    kept: list[Value | None] = []
    apart = {program.maker(conv).source for conv in folded if not f.wanted[conv]}
    for number, (value, readers) in enumerate(zip(f.values, program.every_reader, strict=True)):
        node = program.maker(number)
        kinds = (Convolution, Normalisation) if node is None else Convolution  # a norm has its source with it
        read = any(f.wanted[reader] and isinstance(program.maker(reader), kinds) for reader in readers)
        clamps = isinstance(node, Addition | Normalisation) and node.relu and f.wanted[number]
        mask = clamps and number not in f.masks and (isinstance(node, Addition) or number == program.output)
        if read or mask or (isinstance(value, Lazy) and f.wanted[number]):
            kept.append(value)
        elif number in apart:
            kept.append(value.clone(memory_format=torch.preserve_format) if node is None else value)
        else:
            kept.append(None)
    return kept


def _by_number(flow: Forward | Backward) -> tuple[dict, ...]:
    """What both directions have of some values."""
    return flow.masks, flow.winners, flow.folded, flow.activated


class Needs(NamedTuple):
    """What wants a gradient."""

    tensors: list[StepGrads]  # of each node
    inputs: tuple[bool, ...]


class Facts(NamedTuple):
    """What backward must know of a forward beside tensors: the same for all calls of one form."""

    lowered: Lowered
    places: Places  # see :func:`present`
    dtype: torch.dtype
    saved: object  # see :class:`Recorder`
    numbers: tuple[tuple[int, ...], ...]  # the values of :func:`_by_number`
    dtypes: list[torch.dtype | None]  # of four tensors of each node
    shapes: list[torch.Size | None] | None  # of values
    aliased: list[int]  # of ``flatten(tensors)``: what is used and not saved, of which an alias is kept
    counters: list[int]  # tensors that tell by their version whether running statistics were moved
    keeps_input: bool
    copies_input: bool  # to keep it: nobody else writes to that
    watches_output: bool  # which is clamped and not kept: stock saves it, and notices writes to it


def forward(
    lowered: Lowered, places: Places, needs: Needs, given: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], Facts]:
    """The output, its statistics if they are known (two, or None), and what is to be saved.

    `given`: sample factor, the statistics of x if they are known, x, residual, and the tensors of all nodes.
    """
    (sample_factor, *entering, x, residual), tensors = given[:5], regroup(spread(given[5:], places))
    program = lowered.program
    wanted = program.wanted(*needs)
    f = Forward(program, (x, residual)[: program.inputs], tensors, sample_factor, wanted)
    if entering[0] is not None:
        f.emitted[0] = tuple(entering)
    for step in lowered.steps:
        step.forward(f)
    # only now, when nothing can fail any more
    update_running_all([f.statistics[norm] for norm in sorted(f.statistics)])
    # convolutions that were never written and whose norm wants gradients, which are made of what they read
    folded = {program.maker(norm).source for norm in f.folded if f.wanted[norm]}
    own, aliased = held(program, tensors, wanted, folded)
    kept, out = _kept(program, f, folded), f.output
    by_number = _by_number(f)
    recorder = Recorder([sample_factor, own, kept, *(list(found.values()) for found in by_number)])
    facts = Facts(
        lowered=lowered,
        places=places,
        dtype=x.dtype,
        saved=recorder.shape,
        numbers=tuple([tuple(found) for found in by_number]),
        dtypes=[None if t is None else t.dtype for node in tensors for t in node[:4]],
        shapes=None if torch.compiler.is_compiling() else [_shape(value) for value in f.values],
        aliased=aliased,
        counters=[i for i in map(places.__getitem__, replay.counters(program)) if i is not None],
        keeps_input=kept[0] is not None,
        copies_input=kept[0] is not None and kept[0] is not x,
        watches_output=program.clamped and kept[-1] is not out,
    )
    return [out, *f.emitted.get(program.output, (None, None)), *recorder.flat], facts


def restored(facts: Facts, needs: Needs, saved: Sequence[Tensor]) -> Backward:
    """A backward that begins."""
    sample_factor, tensors, values, *more = Recorder.rebuild(facts.saved, iter(saved))
    b = Backward(facts.lowered.program, values, tensors, sample_factor, *needs, facts.shapes)
    b.in_place = facts.lowered.in_place
    for into, found, names in zip(_by_number(b), more, facts.numbers, strict=True):
        into.update(zip(names, found, strict=True))
    return b


def backward(facts: Facts, needs: Needs, grad_out: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of x, of the residual, and of the tensors of all nodes."""
    b, inputs = restored(facts, needs, saved), facts.lowered.program.inputs
    b.give(b.program.output, Pending(channels_last(grad_out.to(facts.dtype)), owned=False))
    for step in reversed(facts.lowered.steps):
        if (grad := b.dense(step.value)) is not None:
            step.backward(b, grad)
    found = [*map(b.dense, range(inputs)), None]
    # never a gradient that autograd lent us, or that another input has
    given_out = [None if grad is None else grad.grad if grad.owned else grad.grad.clone() for grad in found]
    flat = _flat_grads(b.grads[inputs:], b.tensors[inputs:], facts.dtypes)
    return [*given_out[:2], *(grad for grad, i in zip(flat, facts.places, strict=True) if i is not None)]


def _shape(value: Value | None) -> torch.Size | None:
    return None if value is None else value.z.shape if isinstance(value, Lazy) else value.shape


def _flat_grads(
    grads: list[StepGrads], tensors: list[StepTensors], dtypes: list[torch.dtype | None]
) -> list[Tensor | None]:
    """Gradients in the order of :func:`flatten`, each in its tensor's dtype and strides. `dtypes`: four for a node."""
    flat: list[Tensor | None] = []
    for i, (grad, own) in enumerate(zip(grads, tensors, strict=True)):
        pairs = zip(grad, dtypes[4 * i : 4 * i + 4], strict=True)
        found = [None if value is None or dtype is None else value.to(dtype) for value, dtype in pairs]
        flat += [None if found[0] is None else restrided(found[0], own.weight), *found[1:]]
        flat += [None] * (len(own) - len(found))
    return flat
