"""A program as one autograd node: forward over its steps, backward over them in reverse.

Forward saves the block's input, the raw tensor of every norm with a few numbers a channel, and of an output that a ReLU
clamped its mask: itself, which the next block saves anyway, or bits. Activations are written for the convolutions that
read them, and again on the way back.
"""

from __future__ import annotations

import dataclasses

import torch

from ..ops import stat_dtype
from . import replay, stock
from .conv import channels_last
from .flow import Backward, Forward, Handed
from .kinds import Kind
from .layout import is_channels_last, restrided, worked_on
from .lazy import Lazy, Pending, Value
from .program import Addition, Call, Convolution, Normalisation, Program
from .running import update_running_all
from .saved import Alias, Recorder, counter_of, held, layouts_of, refuses_inference_tensors, unpacked, version
from .spec import StepGrads, StepTensors, flatten, regroup

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program and how it runs: its steps, in order; None: by stock's operations."""

    program: Program
    steps: tuple[Kind, ...] | None
    in_place: bool = True  # whether gradients are written over others: where there is an op that does


def _kept(program: Program, f: Forward, folded: set[int]) -> list[Value | None]:
    """Of the values, those that backward reads: what norms made, what convolutions read, what a ReLU clamped.

    Only where a gradient passes. A sum's ReLU may have left bits in its place. Of the convolutions `folded`, see
    :func:`_folded`, also where it passes the norm alone: there an input is a copy, since stock has not saved that.
    """
    kept: list[Value | None] = []
    apart = {program.maker(conv).source for conv in folded if not f.wanted[conv]}
    for number, value in enumerate(f.values):
        node, readers = program.maker(number), program.readers(number)
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


def _folded(program: Program, f: Forward) -> set[int]:
    """The convolutions that were never written and whose norm wants gradients, which are made of what they read."""
    return {program.maker(norm).source for norm in f.folded if f.wanted[norm]}


def _needs(ctx, tensors: list[StepTensors]) -> tuple[list[StepGrads], tuple[bool, ...]]:
    """Which of each node's tensors, and of the inputs, want a gradient; in a graph, which cannot tell yet, all."""
    if torch.compiler.is_compiling():
        return [StepGrads(*(t is not None for t in own[:4])) for own in tensors], (True, True)
    return [StepGrads(*group[:4]) for group in regroup(ctx.needs_input_grad[6:])], ctx.needs_input_grad[4:6]


class FusedProgram(torch.autograd.Function):
    """Autograd node of a :class:`Lowered` program; use :func:`run_program`."""

    @staticmethod
    def forward(
        ctx,
        lowered: Lowered,
        handed: Handed | None,
        given: Tensor | None,
        sample_factor: Tensor | None,
        x: Tensor,
        residual: Tensor | None,
        *flat: Tensor | None,
    ) -> Tensor:
        program, tensors = lowered.program, regroup(flat)
        wanted = program.wanted(*_needs(ctx, tensors))
        f = Forward(program, (x, residual)[: program.inputs], tensors, sample_factor, wanted)
        if handed is not None and handed.entering is not None:
            f.emitted[0] = handed.entering
        for step in lowered.steps:
            step.forward(f)
        if handed is not None:
            handed.leaving = f.emitted.get(program.output)
        # only now, when nothing can fail any more
        update_running_all([f.statistics[norm] for norm in sorted(f.statistics)])
        folded = _folded(program, f)
        own, aliased = held(program, tensors, wanted, folded)
        kept, out = _kept(program, f, folded), f.output
        ctx.counters, ctx.converted, written = (), given is not None, None
        if not torch.compiler.is_compiling():
            ctx.counters = replay.counters(program, tensors)
            if kept[0] is None:  # stock does not save it: only a backward that runs all of it again needs it
                given, aliased = None, [Alias(0, x, version(x)), *aliased]
            elif kept[0] is not x:  # a copy, which nobody else writes to
                given = None
            if program.clamped and kept[-1] is not out:
                written = counter_of(out)  # stock saves it, and notices writes to it
        ctx.lowered, ctx.aliased, ctx.dtype = lowered, aliased, x.dtype
        by_number = (f.masks, f.winners, f.folded)
        ctx.numbers = [tuple(found) for found in by_number]
        ctx.dtypes = [None if t is None else t.dtype for node in tensors for t in node[:4]]
        ctx.shapes = None if torch.compiler.is_compiling() else [_shape(value) for value in f.values]
        recorder = Recorder([given, written, sample_factor, own, kept, *(list(found.values()) for found in by_number)])
        ctx.save_for_backward(*recorder.flat)
        ctx.layouts, ctx.shape = layouts_of(recorder.flat), recorder.shape
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        saved = Recorder.rebuild(ctx.shape, iter(unpacked(ctx.saved_tensors, ctx.layouts)))
        _, _, sample_factor, tensors, values, *more = saved
        program, needs_inputs = ctx.lowered.program, ctx.needs_input_grad[4:6]
        needs = [StepGrads(*group[:4]) for group in regroup(ctx.needs_input_grad[6:])]
        b = Backward(program, values, tensors, sample_factor, needs, needs_inputs, ctx.shapes)
        b.in_place = ctx.lowered.in_place
        for into, found, names in zip((b.masks, b.winners, b.folded), more, ctx.numbers, strict=True):
            into.update(zip(names, found, strict=True))
        if replay.is_needed(ctx, grad_out):
            return None, None, None, *replay.gradients(ctx, grad_out, b)
        b.give(program.output, Pending(channels_last(grad_out.to(ctx.dtype)), owned=False))
        for step in reversed(ctx.lowered.steps):
            step.backward(b)
        inputs = [_given_out(b, number) for number in range(program.inputs)] + [None]
        return None, None, None, None, *inputs[:2], *_flat_grads(b.grads[program.inputs :], tensors, ctx.dtypes)


def _shape(value: Value | None) -> torch.Size | None:
    return None if value is None else value.z.shape if isinstance(value, Lazy) else value.shape


def _given_out(b: Backward, number: int) -> Tensor | None:
    """The gradient of an input; never one that autograd lent us, or that another input has."""
    found = b.dense(number)
    return None if found is None else found.grad if found.owned else found.grad.clone()


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


def run_program(lowered: Lowered, call: Call, handed: Handed | None = None) -> Tensor:
    """The output of a lowered program on the tensors of `call`, as one autograd node, in channels_last.

    ``x`` and the residual may have any layout; they are worked on in channels_last. Weights in the dtype of x.
    `handed`: the statistics of ``x``, if known, and, afterwards, those of the output.
    """
    if lowered.steps is None or refuses_inference_tensors(call.tensors):
        return stock.program_output(call, moves=True)
    weights = [call.tensors[node].weight for node in lowered.program.main_convolutions]
    in_channels_last = is_channels_last(call.x, weights)
    x, factor, residual = worked_on(call.x, in_channels_last), call.sample_factor, call.residual
    counter = None  # stock saves what it was given, and notices writes to it
    if x is not call.x and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        counter = counter_of(call.x)
    residual = None if residual is None else worked_on(residual, in_channels_last)
    factor = None if factor is None else factor.to(stat_dtype(x.dtype))
    return FusedProgram.apply(lowered, handed, counter, factor, x, residual, *flatten(call.tensors))
