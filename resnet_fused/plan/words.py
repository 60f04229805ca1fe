"""What was chosen, in words: what ``explain`` says of a block."""

from __future__ import annotations

from ..steps import evaluation_flow
from ..steps.directions import Lowered
from ..steps.gpu_evaluation_kinds import Chain
from ..steps.join import JOINS, Join
from ..steps.kinds import Kind
from ..steps.program import Program


def of_step(step: Kind, program: Program) -> str:
    """A step."""
    projected = isinstance(step, Join) and program.terms(step.value).projected
    return f"{step.word}, shortcut {JOINS[step.gram_other]}" if projected else step.word


def of_steps(lowered: Lowered) -> str:
    """How a program runs: its steps in order."""
    if lowered.steps is None:
        return "stock"
    return "; ".join(of_step(step, lowered.program) for step in lowered.steps)


def of_evaluation(lowered: evaluation_flow.Lowered) -> str:
    """How a program runs in evaluation: its steps in order, with what each does beside."""
    steps = [link for step in lowered.steps for link in (step.launched if isinstance(step, Chain) else (step,))]
    text = "evaluation: " + "; ".join(map(_with_beside, steps))
    return text if len(steps) == len(lowered.steps) else f"{text}; in one call"


def _with_beside(step: evaluation_flow.ForwardStep) -> str:
    beside = {"norm": step.normed, "sum": step.adds, "ReLU": step.relu}
    names = [name for name, there in beside.items() if there]
    return f"{step.word} with {', '.join(names)}" if names else step.word
