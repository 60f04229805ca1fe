"""A program as one autograd node, which repeats what calls of one form dispatch (:mod:`..backends.tape`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import dispatch, met, tape
from ..ops import stat_dtype
from . import dense, directions, remade, replay, stock
from .directions import Facts, Lowered, Needs
from .flow import Handed
from .layout import is_transformed, suggests_channels_last, worked_on
from .program import Call
from .replay import INPUTS
from .saved import counter_of, layouts_of, refuses_inference_tensors, unpacked, version
from .spec import Places, StepGrads, flatten, present, regroup, spread

KEPT = 8  # backwards of one forward that are kept
ALIGNED = 16  # bytes: more than this no kernel reads of an address


class RepeatedProgram:
    """What is kept of a program for calls of one form: shapes, strides, settings, and what wants a gradient."""

    def __init__(self) -> None:
        self.forward = tape.Repeated()
        self._backwards: dict[tuple, tape.Repeated] = {}

    def backward(self, grad: Tensor, needs: tuple[bool, ...], saved: Sequence[Tensor | None]) -> tape.Repeated | None:
        """The same for gradients of one form and whatever autograd asks for; None where the call is not plain.

        `saved`: in whose place others can have come to lie, by ``parameter.data = ...``.
        """
        plain = type(grad) is Tensor and not torch.is_autocast_enabled(grad.device.type)
        if not plain or met.is_seen():
            return None
        places = [t.data_ptr() % ALIGNED for t in (grad, *saved)]
        key = grad.dtype, needs, *map(Tensor.stride, (grad, *saved)), *places, *dispatch.state()
        found = self._backwards.get(key)
        if found is None:
            if len(self._backwards) >= KEPT:
                self._backwards.clear()
            found = self._backwards[key] = tape.Repeated()
        return found


def _run(once: Callable, repeated: tape.Repeated | None, given: Sequence[Tensor | None]) -> tuple[list, Any]:
    return once(*given) if repeated is None else repeated(once, given)


def _needs(ctx, places: Places) -> Needs:
    needs = ctx.needs_input_grad[INPUTS:]
    flat = [bool(need) for need in spread(needs[2:], places)]
    return Needs([StepGrads(*group[:4]) for group in regroup(flat)], needs[:2])


class FusedProgram(torch.autograd.Function):
    """Autograd node of a :class:`Lowered` program; use :func:`run_program`."""

    @staticmethod
    def forward(
        ctx,
        lowered: Lowered,
        places: Places,
        handed: Handed | None,
        repeated: RepeatedProgram | None,
        given: Tensor | None,
        sample_factor: Tensor | None,
        x: Tensor,
        residual: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        entering = (None, None) if handed is None or handed.entering is None else handed.entering
        inputs = (sample_factor, *entering, x, residual, *tensors)
        if torch.compiler.is_compiling():  # which cannot tell yet what wants a gradient
            everything = [StepGrads(*(t is not None for t in own[:4])) for own in regroup(spread(tensors, places))]
            needs = Needs(everything, (True, True))
            (out, _, _, *saved), ctx.facts = directions.forward(lowered, places, needs, inputs)
            ctx.counters, ctx.layouts, ctx.repeated = (), (), None
            ctx.save_for_backward(None, None, *saved)
            return out

        def once(*inputs: Tensor | None) -> tuple[list[Tensor | None], Facts]:
            return directions.forward(lowered, places, _needs(ctx, places), inputs)

        (out, mean, m2, *saved), facts = _run(once, None if repeated is None else repeated.forward, inputs)
        if handed is not None:
            handed.leaving = None if mean is None else (mean, m2)
            handed.source = remade.source_of(facts, saved, out)
        ctx.facts, ctx.repeated, ctx.converted = facts, repeated, given is not None
        ctx.counters = [(tensors[i], version(tensors[i])) for i in facts.counters]
        ctx.others = [tensors[places[i]] for i in facts.aliased]
        if not facts.keeps_input:  # nor does stock: only a backward that runs all of it again needs it
            ctx.others.append(x)
        ctx.versions = [*map(version, ctx.others)]
        given = given if facts.keeps_input and not facts.copies_input else None
        ctx.save_for_backward(given, counter_of(out) if facts.watches_output else None, *saved)
        ctx.layouts = layouts_of(saved)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        grad_out = grad_out.resolve_neg()
        saved, nothing = unpacked(ctx.saved_tensors[2:], ctx.layouts), (None,) * INPUTS
        if torch.is_grad_enabled() or is_transformed(grad_out) or replay.moved(ctx):
            known = directions.restored(ctx.facts, _needs(ctx, ctx.facts.places), saved)
            return *nothing, *replay.gradients(ctx, grad_out, known)

        def once(grad_out: Tensor, *saved: Tensor) -> tuple[list[Tensor | None], None]:
            return directions.backward(ctx.facts, _needs(ctx, ctx.facts.places), grad_out, saved), None

        repeats = ctx.repeated is not None and not ctx.layouts
        known = ctx.repeated.backward(grad_out, ctx.needs_input_grad, saved) if repeats else None
        return *nothing, *_run(once, known, (grad_out, *saved))[0]


def run_program(
    lowered: Lowered, call: Call, handed: Handed | None = None, repeated: RepeatedProgram | None = None
) -> Tensor:
    """The output of a lowered program on the tensors of `call`, as one autograd node, in channels_last.

    ``x`` and the residual may have any layout; they are worked on in channels_last. Weights in the dtype of x.
    `handed`: the statistics of ``x``, if known, and, afterwards, those of the output. `repeated`: what is kept for all
    calls of this form.
    """
    if lowered.steps is None or refuses_inference_tensors(call.tensors):
        return stock.program_output(call, moves=True)
    deciding = call.x, *(call.tensors[node].weight for node in lowered.program.main_convolutions)
    factor = None if call.sample_factor is None else call.sample_factor.to(stat_dtype(call.x.dtype))
    inputs = call.x, call.residual, *present(flatten(call.tensors))
    return run_flat(lowered, repeated, handed, factor, *inputs, any(map(suggests_channels_last, deciding)))


def run_flat(
    lowered: Lowered,
    repeated: RepeatedProgram | None,
    handed: Handed | None,
    factor: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    tensors: Sequence[Tensor],
    places: Places,
    in_channels_last: bool,
) -> Tensor:
    """:func:`run_program` where nothing is left to decide. `tensors`: of all nodes, see :func:`present`.

    `in_channels_last`: whether stock's result would be.
    """
    given, counter = x, None  # stock saves what it was given, and notices writes to it
    x = worked_on(x, in_channels_last)
    if x is not given and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        counter = counter_of(given)
    residual = None if residual is None else worked_on(residual, in_channels_last)
    moves_again = lowered.program.dense == dense.CHECKPOINTED and torch.is_grad_enabled()
    handed = Handed() if moves_again and handed is None else handed
    # where a call is plain, without a look at each argument for transforms of functorch's
    apply = FusedProgram.apply if repeated is None else super(torch.autograd.Function, FusedProgram).apply
    out = apply(lowered, places, handed, repeated, counter, factor, x, residual, *tensors)
    if not moves_again or not out.requires_grad or handed.leaving is None:
        return out
    return dense.moving_again(out, lowered.program, regroup(spread(tensors, places)), x, handed.leaving)
