"""What a fused model does and why: the plan of each block, and its traffic beside stock's. Runs nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..blocks import plan
from ..blocks.modules import FusedConvBNReLU, FusedResidualBlock
from .fuse import fuse, report
from .fused_module import FusedModule, stock_forward
from .stem import FusedStem
from .traffic import Counter, SavedBytes, Traffic

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One block, or the model, fused and stock."""

    name: str
    shape: tuple[int, ...]  # of its input
    plan: str
    fused: Traffic
    stock: Traffic
    fused_saved: int  # bytes kept for backward
    stock_saved: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; ``str()`` is a table of figures per image."""

    blocks: tuple[Comparison, ...]
    model: Comparison
    left: tuple[str, ...]  # what stays stock, with reasons
    training: bool

    def __str__(self) -> str:
        head = ["block", "input", "plan", "MB moved", "stock", "GFLOP", "stock"]
        head += ["MB saved", "stock"] if self.training else []
        rows = [head, ["---"] * len(head)]
        rows += [self._row(entry) for entry in (*self.blocks, self.model)]
        passes = "forward and backward" if self.training else "forward"
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines += ["", f"Figures per image, {passes}. Counted from the operations, not measured."]
        lines += [f"Left stock: {row}" for row in self.left]
        return "\n".join(lines)

    def _row(self, entry: Comparison) -> list[str]:
        images = entry.shape[0]
        figures = [entry.fused.bytes / 1e6, entry.stock.bytes / 1e6, entry.fused.flops / 1e9, entry.stock.flops / 1e9]
        figures += [entry.fused_saved / 1e6, entry.stock_saved / 1e6] if self.training else []
        cells = [f"{figure / images:.2f}" for figure in figures]
        return [entry.name, "x".join(map(str, entry.shape[1:])), entry.plan, *cells]


def explain(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
) -> Explanation:
    """The plan of every fused block of `model`, with bytes, FLOPs and saved bytes, beside stock's.

    Works on a copy made of fake tensors: no arithmetic is done, `model` is not touched, and it need not be fused yet
    (the copy is).

    Args:
        model: the model.
        input_size: ``(N, C, H, W)``.
        dtype: of input and parameters. 16-bit stands for training under autocast.
        training: count a training step (forward and backward); else an evaluation.

    Raises:
        ValueError: `input_size` does not have four positive entries.
    """
    if len(input_size) != 4 or min(input_size) < 1:
        raise ValueError(f"explain: input_size is {tuple(input_size)}; pass (N, C, H, W), e.g. (16, 3, 224, 224)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model with nothing to fuse is explained all the same
        fused = fuse(copy.deepcopy(model)).train(training)
    left = tuple(f"{row.name or '(model)'} ({row.kind}): {row.reason}" for row in report(fused).left)
    mode = FakeTensorMode()
    fake = _make_fake(fused, mode, dtype)
    with mode:
        x = torch.empty(tuple(input_size), dtype=dtype).contiguous(memory_format=torch.channels_last)
        inputs = _inputs(fake, x)
        blocks = tuple(_compare(name, fake.get_submodule(name), h, training) for name, h in inputs.items())
        total = _compare("whole model", fake, x, training)
    return Explanation(blocks, dataclasses.replace(total, plan=""), left, training)


def _make_fake(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    """`model` itself with every tensor in it replaced by a fake one, floating-point ones of `dtype`."""
    made: dict[int, Tensor] = {}  # a tensor shared by two modules stays one tensor

    def fake(t: Tensor) -> Tensor:
        if id(t) not in made:
            made[id(t)] = mode.from_tensor(t.detach()).to(dtype if t.is_floating_point() else t.dtype)
        return made[id(t)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model


def _inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The input of every fused block, from one fake forward."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        kinds = (FusedModule, FusedConvBNReLU, FusedResidualBlock)
        if name and isinstance(module, kinds) and not isinstance(module, FusedStem):

            def note(_, args, name=name):
                seen.setdefault(name, args[0])

            handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def _compare(name: str, module: nn.Module, x: Tensor, training: bool) -> Comparison:
    notes: list[str] = []
    plan.observers.append(notes.append)
    try:
        fused, fused_saved = _count(module, x, training, contextlib.nullcontext())
    finally:
        plan.observers.pop()
    stock, stock_saved = _count(module, x, training, stock_forward())
    text = "; ".join(dict.fromkeys(notes)) or ("folded inference" if not training else "")
    return Comparison(name, tuple(x.shape), text, fused, stock, fused_saved, stock_saved)


def _count(module: nn.Module, x: Tensor, training: bool, context) -> tuple[Traffic, int]:
    parameters = list(module.parameters())
    x = x.detach().requires_grad_(training)
    with context, Counter() as counter, torch.set_grad_enabled(training):
        saved = SavedBytes([*parameters, *module.buffers()])
        with saved:
            out = module(x)
        if training:
            torch.autograd.grad(
                out, [p for p in parameters if p.requires_grad] + [x], torch.empty_like(out), allow_unused=True
            )
    return counter.total, saved.bytes
