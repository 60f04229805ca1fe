"""`tune`: measure the variants of every fused chain of a model, and keep the fastest of each for the plan.

Each chain is measured by itself, on the activations that reach it (:mod:`.timing`). The choices go where the plan finds
them (:mod:`.measured`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..steps.program import Call, Pooling
from . import choose, keys, lower, measured, timing, variants
from .variants import Variant


@dataclasses.dataclass(frozen=True)
class TunedChain:
    """What was measured of one chain; `chosen` and `modelled` (the cost model's choice) name candidates."""

    chain: str
    shape: tuple[int, ...]  # of its input
    settings: str  # dtype, who runs the ops, threads
    candidates: tuple[timing.Candidate, ...]
    chosen: str
    modelled: str
    alike: int = 1  # how many chains of the model are such


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The result of :func:`tune`; ``str()`` is a table."""

    device: str
    chains: tuple[TunedChain, ...]
    fixed: int  # chains with one variant only
    file: str  # where the choices are kept; empty if they could not be

    def __str__(self) -> str:
        rows = [["chain", "input", "alike", "variant", "ms", "MB saved", ""]]
        for chain in self.chains:
            first = [chain.chain, "x".join(map(str, chain.shape)), str(chain.alike)]
            marks = {"chosen": chain.chosen, "cost model": chain.modelled}
            for candidate in chain.candidates:
                own = [mark for mark, variant in marks.items() if variant == candidate.variant]
                figures = [f"{candidate.milliseconds:.3g}", f"{candidate.saved / 1e6:.2f}"]
                rows.append([*first, candidate.variant, *figures, ", ".join(own)])
                first = ["", "", ""]
        lines = [*_table(rows), ""] if self.chains else []
        if self.chains:
            settings = "; ".join(dict.fromkeys(chain.settings for chain in self.chains))
            lines += [f"Medians of forward and backward ({settings}) on {self.device}."]
            lines += [f"A variant that saves less memory must be {timing.MARGIN:.0%} faster than one that saves more."]
            lines += [f"Kept in {self.file}" if self.file else "Kept in this process only."]
        lines += [f"Chains with nothing to choose: {self.fixed}."] if self.fixed or not self.chains else []
        return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    """A markdown table."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]


def tune(model: nn.Module, example: Tensor | tuple) -> Tuned:
    """Measure every variant of every fused chain of `model` on this device, and use the fastest from now on.

    The choices are kept on disk, see :mod:`.measured`; they hold for chains of these geometries, with inputs of these
    very shapes and dtypes, in this process and in later ones on the same kind of device with the same versions. All
    others are left to the cost model. Tuning again replaces what was measured before. Results stay the same to
    rounding, whichever variant is chosen.

    Works on a copy, in training mode: `model`, its buffers and gradients, and the random state stay as they are. Takes
    less memory than a training step, beside the copy. Measured with gradients for all inputs and parameters, one chain
    at a time: what the activations of other chains do to caches and allocators is not in the figures.

    Args:
        model: a fused model (see :func:`resnet_fused.fuse`) on the device to measure. Batch norms that are in
            evaluation mode stay so if the model itself is in training mode.
        example: its input, as in training: batch size, image size, dtype and device; a tuple of several arguments. Call
            this under ``torch.autocast`` if you train so.

    Returns:
        What was measured and chosen; ``str()`` is a table.

    Raises:
        TypeError: `model` is not a module, or `example` is neither a tensor nor a tuple.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune: model is {type(model).__name__}; pass a torch.nn.Module")
    if not isinstance(example, Tensor | tuple):
        raise TypeError(f"tune: example is {type(example).__name__}; pass the model's input, a tensor, or a tuple")
    arguments = example if isinstance(example, tuple) else (example,)
    tuner = _Tuner()
    with _undisturbed(model), choose.tuning(tuner):
        mine = copy.deepcopy(model)
        if not mine.training:
            mine.train()
        mine(*(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments))
    if not tuner.seen:
        text = f"tune: no fused chain ran in {type(model).__name__}; call fuse(model) first, and see report(model)"
        warnings.warn(text, stacklevel=2)
    return tuner.finish()


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Gradients on, nothing compiled, nothing saved for a backward of the model; the random state as it was, after."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing),
    ):
        yield


class _Tuner:
    """Chooses in the plan's place, by measuring what it has not met."""

    def __init__(self) -> None:
        self.seen = self.fixed = 0
        self.found: dict[tuple, tuple[TunedChain, Variant]] = {}  # by device, key and shape
        self.rows: dict[torch.device, list[dict]] = {}

    def __call__(self, call: Call) -> Variant | None:
        """The fastest variant of `call`; None where there is nothing to choose or to run."""
        x = call.x
        if (type(x) is not Tensor and type(x) is not nn.Parameter) or isinstance(call.program.nodes[-1], Pooling):
            return None
        self.seen += 1
        allowed = lower.allowed(call)
        if len(allowed) == 1:
            self.fixed += 1
            return None
        key = keys.key_of(call)
        place = x.device, key, tuple(x.shape)
        if place in self.found:
            known, choice = self.found[place]
            self.found[place] = dataclasses.replace(known, alike=known.alike + 1), choice
            return choice
        candidates = timing.Trial(call).measure(allowed)
        choice = timing.fastest(candidates)
        modelled = variants.modelled(call, call.shapes())
        told = TunedChain(
            keys.geometry(call), tuple(x.shape), keys.settings(call), tuple(candidates.values()),
            candidates[choice].variant, timing.name(call, modelled),
        )  # fmt: skip
        self.found[place] = told, choice
        figures = {c.variant: round(c.milliseconds, 4) for c in candidates.values()}
        row = {"chain": key, "shape": list(x.shape), "choice": choice._asdict(), "milliseconds": figures}
        self.rows.setdefault(x.device, []).append(row)
        return choice

    def finish(self) -> Tuned:
        """Store what was found, and say it."""
        files, problems = [], []
        for device, rows in self.rows.items():
            try:
                measured.store(device, rows)
                files.append(str(measured.file_of(device)))
            except OSError as error:
                problems.append(str(error))
        if problems:
            text = f"tune: the choices hold for this process only, as they cannot be kept ({'; '.join(problems)})"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        names = ", ".join(measured.device_name(device) for device in self.rows)
        return Tuned(names or "no device", tuple(t for t, _ in self.found.values()), self.fixed, ", ".join(files))
