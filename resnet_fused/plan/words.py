"""What was chosen, in words: what ``explain`` says of a block."""

from __future__ import annotations

from ..steps import evaluation, gpu_evaluation
from ..steps.directions import Lowered
from ..steps.evaluation import (
    FewPixels,
    FoldedConvolution,
    ForwardStep,
    NormPass,
    NormValue,
    RawPool,
    StockNorm,
    StockPool,
    WinogradConvolution,
)
from ..steps.gpu_evaluation import Add, Product
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


_EVALUATION = {
    FoldedConvolution: "convolution",
    WinogradConvolution: "convolution",
    FewPixels: "convolution of few pixels",
    NormValue: "norm on load",
    NormPass: "pass",
    StockNorm: "norm",
    RawPool: "ReLU and pool in one pass",
    StockPool: "pool",
    Product: "1x1 convolution",
    gpu_evaluation.Convolve: "convolution",
    Add: "sum in place",
}


def of_evaluation(lowered: evaluation.Lowered) -> str:
    """How a program runs in evaluation: its steps in order."""
    return "evaluation: " + "; ".join(map(_word, lowered.steps))


def _word(step: ForwardStep) -> str:
    """A step, with what it does beside."""
    word, part = _EVALUATION[type(step)], getattr(step, "folded", None)
    if isinstance(step, WinogradConvolution):
        word = f"Winograd F({step.outputs}x{step.outputs}) convolution"
    part = step.main if isinstance(step, Product | FewPixels) else part
    normed = isinstance(step, NormPass) or (part is not None and part.norm is not None)
    added = step.other is not None or (isinstance(step, Product) and step.projection is not None)
    beside = {"norm": normed, "sum": added and not isinstance(step, Add), "ReLU": step.relu}
    names = [name for name, there in beside.items() if there]
    return f"{word} with {', '.join(names)}" if names else word
