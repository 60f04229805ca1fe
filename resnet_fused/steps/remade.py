"""The output of a program, made again in backward from what its node keeps, for who alone reads it: a gate.

A gate (:mod:`.gate`) needs its input for the gradient of its factor. Where that is what a program made, it holds in
its place what makes it: the raw tensor that the last norm read, or, where a Gram join never wrote that, what its
convolution read, with a copy of the weight. But for that the node holds the same tensors, so that nothing more is kept.
The ops of the forward run again on the same bits, and give the same, whatever was written to a parameter in between.
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
    """What makes `out` again; None where it is not to be, is kept anyway, or is smaller. `saved`: by the node.

    Of what that saves, the tensors that make the output are in their places, parameters as copies, and None for others.
    """
    if not facts.lowered.remakes or any(t is out for t in saved):
        return None
    last, b = facts.lowered.steps[-1], _restored(facts, saved)
    wanted, parameters = ({id(t) for t in Recorder(item).flat} for item in (last.remade_from(b), b.tensors))
    entering = {id(t) for t in b.values[: facts.lowered.program.inputs]}  # which anybody may write to
    copied = [t for t in saved if t is not None and id(t) in wanted & parameters]
    if wanted & entering or sum(t.nbytes for t in copied) >= out.nbytes:
        return None
    held = [None if id(t) not in wanted else t.detach().clone() if id(t) in parameters else t for t in saved]
    return Source(facts, held)


def _restored(facts: Facts, saved: Sequence[Tensor | None]) -> Backward:
    nothing = Needs([StepGrads()] * len(facts.lowered.program.nodes), (False, False))
    return restored(facts, nothing, saved)


def make(facts: Facts, saved: Sequence[Tensor | None]) -> Tensor:
    """The output; `saved`: what a :class:`Source` holds."""
    device = next(t.device.type for t in saved if t is not None)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return facts.lowered.steps[-1].remade(_restored(facts, saved))
