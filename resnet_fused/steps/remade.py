"""The output of a program, made again in backward from what its node keeps, for who alone reads it: a gate.

A gate (:mod:`.gate`) needs its input for the gradient of its factor. Where that is what a program made, it holds in
its place what makes it: the raw tensor that the last norm read, or, where a Gram join never wrote that, what its
convolution read, with the weight. The node holds the same tensors, so that nothing more is kept, and a write to the
weight is noticed as it is there: not one through `.data`, with which the gate's gradients are of another input than its
forward read. The ops of the forward run again on the same bits, and give the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activated import Activate
from .directions import Facts, Needs, restored
from .flow import Backward
from .join import Join
from .kinds import Kind
from .program import Program
from .saved import Recorder, Source
from .spec import StepGrads


def can_be(program: Program, last: Kind) -> bool:
    """Whether the step that ends a program can make its output again from what is kept."""
    return isinstance(last, Activate) or (isinstance(last, Join) and program.terms(last.value).other is None)


def source_of(facts: Facts, saved: Sequence[Tensor | None], out: Tensor) -> Source | None:
    """What makes `out` again; None where it is not to be, or is kept anyway. `saved`: by the program's node."""
    if not facts.lowered.remakes or any(t is out for t in saved):
        return None
    return Source(facts, saved)


def _restored(facts: Facts, saved: Sequence[Tensor | None]) -> Backward:
    nothing = Needs([StepGrads()] * len(facts.lowered.program.nodes), (False, False))
    return restored(facts, nothing, saved)


def held(source: Source) -> list[Tensor | None]:
    """Of what the node saves, that which makes the output, in its place; None for all else."""
    facts, saved = source
    read = Recorder(facts.lowered.steps[-1].remade_from(_restored(facts, saved))).flat
    wanted = {id(t) for t in read}
    return [t if id(t) in wanted else None for t in saved]


def make(facts: Facts, saved: Sequence[Tensor | None]) -> Tensor:
    """The output; `saved`: what was :func:`held`."""
    device = next(t.device.type for t in saved if t is not None)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return facts.lowered.steps[-1].remade(_restored(facts, saved))
