"""A program as one autograd node: forward over its steps, backward over them in reverse.

Forward saves the block's input, the raw tensor of every norm with a few numbers a channel, and an output that a ReLU
clamped. Activations are written for the convolutions that read them, and again on the way back.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from ..ops import stat_dtype
from . import stock
from .conv import channels_last
from .flow import Backward, Forward, Pending, Value
from .kinds import Kind
from .layout import is_channels_last, is_transformed, restrided, worked_on
from .lazy import Lazy
from .program import Addition, Convolution, Normalisation, Program
from .running import update_running_all
from .saved import Alias, Recorder, counter_of, layouts_of, originals, unpacked, version
from .spec import StepGrads, StepTensors, flatten, regroup

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program and how it runs: its steps, in order."""

    program: Program
    steps: tuple[Kind, ...]


def _kept(program: Program, f: Forward) -> list[Value | None]:
    """Of the values, those that backward reads: what norms made, what convolutions read, what a ReLU clamped.

    Only where a gradient passes. An addition's ReLU may have left bits in their place.
    """
    kept: list[Value | None] = []
    for number, value in enumerate(f.values):
        node, readers = program.maker(number), program.readers(number)
        kinds = Convolution if number else (Convolution, Normalisation)  # a norm has its source with it
        read = any(f.wanted[reader] and isinstance(program.maker(reader), kinds) for reader in readers)
        clamped = isinstance(node, Addition) and node.relu and number not in f.masks and f.wanted[number]
        kept.append(value if read or clamped or (isinstance(value, Lazy) and f.wanted[number]) else None)
    return kept


def _held(tensors: list[StepTensors], wanted: list[bool]) -> tuple[list[Tensor | None], tuple[Alias, ...]]:
    """The weight and gamma of each node, which stock saves, so that a write is noticed as there; and all others."""
    held, aliased, width = [], [], len(StepTensors._fields)
    for i, (own, wants) in enumerate(zip(tensors, wanted, strict=True)):
        for j, t in enumerate(own[:4]):
            kept = t if wants and j in (0, 2) else None
            held += [] if j in (1, 3) else [kept]
            if t is not None and kept is None:
                aliased.append(Alias(1 + i * width + j, t, version(t)))
    return held, tuple(aliased)


class FusedProgram(torch.autograd.Function):
    """Autograd node of a :class:`Lowered` program; use :func:`run_program`."""

    @staticmethod
    def forward(ctx, lowered: Lowered, given: Tensor | None, x: Tensor, sample_factor: Tensor | None, *flat):
        tensors = regroup(flat)
        needs = [StepGrads(*group[:4]) for group in regroup(ctx.needs_input_grad[4:])]
        wanted = lowered.program.wanted(needs, ctx.needs_input_grad[2])
        f = Forward(lowered.program, x, tensors, sample_factor, wanted)
        for step in lowered.steps:
            step.forward(f)
        update_running_all(f.statistics)  # only now, when nothing can fail any more
        held, ctx.aliased = _held(tensors, wanted[1:])
        kept = _kept(lowered.program, f)
        if kept[0] is None:  # stock does not save it: only a backward that runs all of it again needs it
            given, ctx.aliased = None, (Alias(0, x, version(x)), *ctx.aliased)
        ctx.masked, ctx.dtype = tuple(f.masks), x.dtype
        ctx.dtypes = [None if t is None else t.dtype for own in tensors for t in own[:4]]
        ctx.shapes = [
            value.z.shape if isinstance(value, Lazy) else None if value is None else value.shape for value in f.values
        ]
        recorder = Recorder([given, sample_factor, held, kept, list(f.masks.values())])
        ctx.save_for_backward(*recorder.flat)
        ctx.layouts, ctx.shape, ctx.lowered = layouts_of(recorder.flat), recorder.shape, lowered
        return f.values[-1]

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        _, sample_factor, held, values, masks = Recorder.rebuild(ctx.shape, unpacked(ctx.saved_tensors, ctx.layouts))
        tensors = [StepTensors(*pair) for pair in zip(held[::2], itertools.repeat(None), held[1::2], strict=False)]
        lowered, needs_x = ctx.lowered, ctx.needs_input_grad[2]
        program = lowered.program
        if torch.is_grad_enabled() or is_transformed(grad_out):
            return None, None, *_by_stock(ctx, program, grad_out, values[0], sample_factor, tensors)
        needs = [StepGrads(*group[:4]) for group in regroup(ctx.needs_input_grad[4:])]
        masks = dict(zip(ctx.masked, masks, strict=True))
        b = Backward(program, values, tensors, sample_factor, needs, needs_x, masks, ctx.shapes)
        b.give(len(program.nodes), Pending(channels_last(grad_out.to(ctx.dtype)), owned=False))
        for step in reversed(lowered.steps):
            step.backward(b)
        grad_x = b.dense(0)
        if grad_x is not None and not grad_x.owned:  # never hand out a gradient that autograd lent us
            grad_x = Pending(grad_x.grad.clone())
        return None, None, None if grad_x is None else grad_x.grad, None, *_flat_grads(b.grads[1:], tensors, ctx.dtypes)


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


def _by_stock(ctx, program: Program, grad_out, x, sample_factor, tensors) -> tuple[Tensor | None, ...]:
    """Gradients of x, sample factor and tensors by stock operations: to be differentiated again, or batched."""
    x, *flat = originals(x, tensors, ctx.aliased)
    create_graph, inputs = torch.is_grad_enabled(), [x, None, *flat]
    with torch.enable_grad(), torch.autocast(grad_out.device.type, enabled=False):
        out = stock.program_output(program, x, sample_factor, regroup(flat))
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        sources = [inputs[i] for i in wanted]
        grads = torch.autograd.grad(out, sources, grad_out, create_graph=create_graph, allow_unused=True)
    result: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(wanted, grads, strict=True):
        result[i] = grad
    return tuple(result)


def run_program(lowered: Lowered, x: Tensor, tensors: list[StepTensors], sample_factor: Tensor | None = None) -> Tensor:
    """The output of a lowered program on `x`, as one autograd node, in channels_last.

    Args:
        lowered: the program and its steps.
        x: ``[N, C, H, W]``, any layout; worked on in channels_last.
        tensors: one :class:`StepTensors` for each node. Weights in the dtype of `x`.
        sample_factor: ``[N]`` or None; multiplies the branch of additions that are `sampled` (Stochastic Depth).
    """
    weights = [tensors[node].weight for node in lowered.program.main_convolutions]
    given, x = x, worked_on(x, is_channels_last(x, weights))
    counter = counter_of(given) if given is not x and torch.is_grad_enabled() else None
    if sample_factor is not None:
        sample_factor = sample_factor.to(stat_dtype(x.dtype))
    return FusedProgram.apply(lowered, counter, x, sample_factor, *flatten(tensors))
