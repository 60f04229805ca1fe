"""Measure one program: time and saved bytes of each variant, forward and backward, all gradients wanted.

The variants run in turn, so that whatever else the machine does falls on all of them alike. The Gram join exists for
the memory that it saves: a variant that saves less must be faster than one that saves more by :data:`MARGIN`.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..steps.join import JOINS
from ..steps.program import Call, Node, Normalisation
from ..steps.program_node import run_program
from ..steps.spec import StepTensors, flatten
from .lower import steps_of
from .too_small import MARGIN
from .variants import Variant

WARMUP = 2  # rounds: kernels are compiled and checked in the first
REPEATS = (5, 25)  # rounds: at least; at most
BUDGET_S = 0.5  # per chain, for rounds beyond the least


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One variant of a program."""

    variant: str
    milliseconds: float  # median of forward and backward
    saved: int  # bytes kept for backward, beside its inputs and its output


def name(call: Call, variant: Variant) -> str:
    """A variant as the report calls it."""
    if variant.stock:
        return "stock"
    text = ("on values, " if variant.values else "") + JOINS[variant.gram]
    terms = call.program.terms(call.program.output)
    text += f", shortcut {JOINS[variant.gram_shortcut]}" if terms is not None and terms.projected else ""
    more = (", all convolutions on load" if variant.taps else "") + (", frozen norms folded" if variant.frozen else "")
    more += ", activations kept" if variant.keep else ""
    return text + more + (", narrow gradients in one pass" if variant.one_pass else "")


def fastest(candidates: dict[Variant, Candidate]) -> Variant:
    """The fastest, where each must beat what saves more memory than it by :data:`MARGIN`."""
    (best, held), *others = sorted(candidates.items(), key=lambda item: (item[1].saved, item[1].milliseconds))
    for variant, candidate in others:
        margin = MARGIN if candidate.saved > held.saved else 0.0
        if candidate.milliseconds < (1 - margin) * held.milliseconds:
            best, held = variant, candidate
    return best


class Trial:
    """One call, to be run in any variant. Its tensors are detached, and no running statistic moves."""

    def __init__(self, call: Call) -> None:
        x = call.x.detach().requires_grad_()
        other = None if call.residual is None else call.residual.detach().requires_grad_()
        own = [_detached(t, node) for node, t in zip(call.program.nodes, call.tensors, strict=True)]
        self.call = Call(call.program, x, own, other, call.sample_factor)
        given = {id(t): t for t in (x, other, call.sample_factor, *flatten(own)) if t is not None}
        self.given = list(given.values())
        self.wanted = [t for t in self.given if t.requires_grad]

    def forward(self, variant: Variant, pack: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return run_program(steps_of(self.call, variant), self.call)

    def step(self, variant: Variant) -> None:
        """What is timed."""
        out = self.forward(variant)
        torch.autograd.grad(out, self.wanted, out.detach())

    def saved_bytes(self, variant: Variant) -> int:
        """Bytes kept for backward, each storage once: not what came in, nor the output, which others keep anyway."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        out = self.forward(variant, pack)
        for tensor in (*self.given, out):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(kept.values())

    def measure(self, variants: list[Variant]) -> dict[Variant, Candidate]:
        """Time and saved bytes of each."""
        device = self.call.x.device
        times = interleave({v: functools.partial(self.step, v) for v in variants}, device)
        return {v: Candidate(name(self.call, v), times[v], self.saved_bytes(v)) for v in variants}


def _detached(own: StepTensors, node: Node) -> StepTensors:
    """The tensors of a node by themselves: without the running statistics that it would move."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in own[:4]]
    frozen = isinstance(node, Normalisation) and not node.norm.batch_stats
    return StepTensors(*leaves, own.running_mean, own.running_var) if frozen else StepTensors(*leaves)


def interleave(steps: dict[Variant, Callable[[], None]], device: torch.device) -> dict[Variant, float]:
    """Median milliseconds of each step, run in turn after a warm-up."""
    taken: dict[Variant, list[float]] = {variant: [] for variant in steps}
    collects, started = gc.isenabled(), 0.0
    gc.disable()
    try:
        for turn in range(-WARMUP, REPEATS[1]):
            started = time.perf_counter() if turn <= 0 else started
            if turn >= REPEATS[0] and time.perf_counter() - started > BUDGET_S:
                break
            for variant, step in steps.items():
                taken[variant].append(milliseconds(step, device))
    finally:
        if collects:
            gc.enable()
    return {variant: statistics.median(samples[WARMUP:]) for variant, samples in taken.items()}


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """How long `step` takes: on a GPU between two events, also what the host needs to start its kernels."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - began)
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
