"""What was chosen, in words: what ``explain`` says of a block."""

from __future__ import annotations

import torch

from ..steps import evaluation_flow
from ..steps.directions import Lowered
from ..steps.frozen import FrozenJoin
from ..steps.gpu_evaluation_kinds import Chain
from ..steps.join import JOINS, Join
from ..steps.kinds import Kind
from ..steps.program import Call, Program
from . import choose, gpu_values, variants


def of_step(step: Kind, program: Program) -> str:
    """A step."""
    terms = program.terms(step.value) if isinstance(step, Join) else None
    if isinstance(step, FrozenJoin):
        beside = {
            "frozen norm": True,
            "projection": terms.projected,
            "sum": terms.other is not None,
            "ReLU": terms.relu,
        }
        return f"{step.word} with {', '.join(name for name, there in beside.items() if there)}"
    return f"{step.word}, shortcut {JOINS[step.gram_other]}" if terms is not None and terms.projected else step.word


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


def why(call: Call, shapes: list[torch.Size]) -> str:
    """Why the cost model chose as it did."""
    if variants.is_small(call, shapes):
        return "stays in the cache"
    found = variants.options(call)
    ends = [terms.branch for _, terms in variants.joins(call.program)]
    if ends and ends[-1] in gpu_values.frozen(call, found is not None and found.values):
        return "running statistics"
    if found is None:
        none_there = choose.value_device(call.program.backend, call.x) is None
        return "no convolution with an epilogue there" if none_there else variants.values_obstacle(call)
    if call.sample_factor is not None and not found.values:
        return "a per-sample factor, which no convolution on tensors applies"
    if not ends:
        return "no batch norm before a sum"
    norm = ends[-1]
    if reason := variants.gram_obstacle(call, norm):
        return reason
    if not call.program.maker(norm).norm.batch_stats:
        return "running statistics"
    if call.program.prefer == "memory":
        return "memory is preferred"
    return f"costs {variants.gram_share(call, norm, shapes, found):+.0%} of its convolution's time"
