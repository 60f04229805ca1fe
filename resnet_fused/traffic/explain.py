"""What a fused model does and why: each block's plan, its traffic and expected time beside stock's. Runs nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ..blocks.dense import FusedDenseBlock
from ..blocks.modules import FusedConvBNReLU, FusedResidualBlock
from ..convert.forced import stock_forward
from ..convert.fuse import fuse, report
from ..convert.fused_module import FusedModule
from ..convert.stem import FusedStem
from ..plan import choose, devices
from ..plan.devices import Device, Expected
from .compiled import FusingCounter
from .count import Counter, SavedBytes, Traffic, tensors
from .faked import casting, copied, gradients, make_fake

Tensor = torch.Tensor
Arguments = tuple[tuple, dict]  # of a call
_SIDES = {"fused": "fused", "stock": "stock", "compiled": "compile"}  # and their names in tables
_BLOCKS = (FusedModule, FusedConvBNReLU, FusedDenseBlock, FusedResidualBlock)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One block, or the model: fused, stock, and stock under torch.compile. Figures are of the whole batch."""

    name: str
    shape: tuple[int, ...]  # of its input
    plan: str
    fused: Traffic
    stock: Traffic
    compiled: Traffic
    fused_saved: int  # bytes kept for backward
    stock_saved: int  # stock's; torch.compile keeps about as much


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Expected seconds of one step of the whole model on a device, by the cost model of :mod:`..plan.devices`."""

    device: Device
    fused: Expected
    stock: Expected
    compiled: Expected


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; ``str()`` is a table of figures per image, and of milliseconds per batch."""

    blocks: tuple[Comparison, ...]
    model: Comparison
    left: tuple[str, ...]  # what stays stock, with reasons
    training: bool
    device: Device | None  # what the plans are made for; None: the CPU
    predictions: tuple[Prediction, ...]  # for `device`; without one, for every known GPU if the dtype is a 16-bit one
    dtype: torch.dtype = torch.float32  # of the input; of 16 bits: what autocast casts to

    def __str__(self) -> str:
        entries = (*self.blocks, self.model)
        plans = [plan for plan in dict.fromkeys(entry.plan for entry in entries) if plan]
        lines = _table([self._head(), *(self._row(entry, plans) for entry in entries)])
        passes = "forward and backward" if self.training else "forward"
        lines += ["", f"MB moved, GFLOP and MB saved per image, {passes}; launches and ms per batch."]
        lines += ["stock: PyTorch eager; compile: torch.compile, fused as far as its rules go."]
        lines += ["Counted from the operations, and predicted from that; not measured."]
        if self.dtype.itemsize == 2:
            name = str(self.dtype).removeprefix("torch.")
            lines += [f"Under autocast to {name}, whose casts of weights are not counted."]
        lines += [_predicted_how(row) for row in self.predictions[:1]]
        lines += [f"Plan {number}: {text}" for number, text in enumerate(plans, 1)]
        if self.predictions and self.device is None:
            head = ["whole model on", "ms", "stock", "compile"]
            lines += ["", *_table([head, *map(_prediction_row, self.predictions)])]
        lines += [f"Left stock: {row}" for row in self.left]
        return "\n".join(lines)

    def _head(self) -> list[str]:
        head = ["block", "input", "plan", "MB moved", "stock", "compile", "GFLOP", "stock"]
        head += ["MB saved", "stock"] if self.training else []
        head += ["launches", "stock", "compile"]
        return head + (["ms", "stock", "compile"] if self.device else [])

    def _row(self, entry: Comparison, plans: list[str]) -> list[str]:
        programs = (entry.fused, entry.stock, entry.compiled)
        images = entry.shape[0]
        figures = [program.bytes / images / 1e6 for program in programs]
        figures += [program.flops / images / 1e9 for program in programs[:2]]
        figures += [entry.fused_saved / images / 1e6, entry.stock_saved / images / 1e6] if self.training else []
        cells = [f"{figure:.2f}" for figure in figures] + [str(program.launches) for program in programs]
        if self.device:
            sides = zip(programs, _SIDES, strict=True)
            cells += [_milliseconds(devices.expect(p.operations, self.device, side)) for p, side in sides]
        number = str(plans.index(entry.plan) + 1) if entry.plan else ""
        return [entry.name, "x".join(map(str, entry.shape[1:])), number, *cells]


def _milliseconds(expected: Expected) -> str:
    low, high = 1e3 * expected.low, 1e3 * expected.high
    digits = 0 if low >= 10 else 1 if low >= 1 else 2
    return f"{low:.{digits}f}-{high:.{digits}f}"


def _predicted_how(row: Prediction) -> str:
    """What a range of milliseconds means, with the host's part of the whole model."""
    hosts = ", ".join(f"{1e3 * getattr(row, side).host:.0f} ms {name}" for side, name in _SIDES.items())
    return (
        f"ms: from a roofline to {devices.SURE_SHARE} of it, or to the host's time, if that is longer: an assumed "
        f"{hosts} for the whole model, which a CUDA graph saves."
    )


def _prediction_row(row: Prediction) -> list[str]:
    return [row.device.name, *map(_milliseconds, (row.fused, row.stock, row.compiled))]


def _table(rows: list[list[str]]) -> list[str]:
    """A markdown table whose first two columns are text and whose others are figures."""
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    texts = 2 if len(rows[0]) > 4 else 1

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i < texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(rows[0]), line(rule), *map(line, rows[1:])]


def explain(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    device: str | Device | None = None,
) -> Explanation:
    """The plan of every fused block of `model`: bytes, FLOPs, saved bytes, kernels and expected time, beside stock's.

    Works on a copy made of fake tensors: no arithmetic is done, the device need not be there, `model` is not touched,
    and it need not be fused yet (the copy is).

    Args:
        model: the model.
        input_size: ``(N, C, H, W)``.
        dtype: of the input. In 16 bits a step under autocast is counted, without its casts of the weights of
            convolutions and linear layers; other float32 tensors stay so. For a model of 16 bits throughout pass one.
        training: count a training step (forward and backward, without the optimizer); else an evaluation. The gradient
            of the model's input is not counted, that of a block's is; a model with no fused blocks in it is taken for
            one.
        device: plan for and predict the time on a GPU, one of "a100", "h100", "h200", "b200", "rtx4090", or a
            :class:`~resnet_fused.plan.devices.Device` that describes another, where Triton and all of its kernels, and
            the compiled convolutions, are taken to be sound; None plans for where the model is and, in 16-bit, adds a
            prediction for each of them.

    Raises:
        ValueError: `input_size` does not have four positive entries, or `device` is unknown.
    """
    if len(input_size) != 4 or min(input_size) < 1:
        raise ValueError(f"explain: input_size is {tuple(input_size)}; pass (N, C, H, W), e.g. (16, 3, 224, 224)")
    target = devices.find(device) if isinstance(device, str) else device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model with nothing to fuse is explained all the same
        fused = fuse(copied(model)).train(training)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors that no module has stay real
    fake = make_fake(fused, mode, dtype)
    left = tuple(report(fake).reasons())  # of what is counted: in one dtype
    with mode:
        place = next((p.device for p in fake.parameters()), None)  # a model on a GPU is planned for as it runs there
        x = torch.empty(tuple(input_size), dtype=dtype, device=place).contiguous(memory_format=torch.channels_last)
        inputs, image, step = _inputs(fake, x), ((x,), {}), _Step(dtype, training)
        blocks = tuple(_compare(name, fake.get_submodule(name), h, step, target) for name, h in inputs.items())
        whole = dataclasses.replace(step, input_grad=not inputs)
        total = _compare("whole model", fake, image, whole, target)
        predictions = _predict_all(fake, image, whole, target, total)
    total = dataclasses.replace(total, plan="") if blocks else total
    return Explanation(blocks, total, left, training, target, predictions, dtype)


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, _BLOCKS) and not isinstance(module, FusedStem)


def _inputs(model: nn.Module, x: Tensor) -> dict[str, Arguments]:
    """What every fused block is called with, from one fake forward."""
    seen: dict[str, Arguments] = {}
    handles = []
    for name, module in model.named_modules():
        if name and _is_block(module):

            def note(_, args, kwargs, name=name):
                seen.setdefault(name, (args, kwargs))

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad(), casting(x.device, x.dtype):
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@dataclasses.dataclass(frozen=True)
class _Step:
    """What is counted of a module."""

    dtype: torch.dtype  # of 16 bits: that of autocast
    training: bool
    input_grad: bool = True  # whether training wants its input's gradient


def _planning(target: Device | None):
    return contextlib.nullcontext() if target is None else choose.planning_for(target)


def _compare(name: str, module: nn.Module, given: Arguments, step: _Step, target: Device | None) -> Comparison:
    with choose.observing() as notes, _planning(target):
        fused, fused_saved = _count(module, given, step, Counter())
    stock = FusingCounter()
    with stock_forward():
        _, stock_saved = _count(module, given, step, stock)
    text = "; ".join(dict.fromkeys(notes))
    return Comparison(
        name, tuple(tensors(given)[0].shape), text, fused, stock.total, stock.compiled(), fused_saved, stock_saved
    )


def _count(module: nn.Module, given: Arguments, step: _Step, counter: Counter) -> tuple[Traffic, int]:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(step.training and step.input_grad and t.is_floating_point())

    parameters, (args, kwargs) = list(module.parameters()), tree_map_only(Tensor, leaf, given)
    wanted = [t for t in (*parameters, *tensors((args, kwargs))) if t.requires_grad]
    with counter, torch.set_grad_enabled(step.training):
        saved = SavedBytes([*parameters, *module.buffers()])
        with saved, casting(tensors(given)[0].device, step.dtype):
            out = module(*args, **kwargs)
        counter.keep(*tensors(out))
        if step.training:
            counter.keep(*gradients(out, wanted))
    return counter.total, saved.bytes


def _predict_all(
    model: nn.Module, given: Arguments, step: _Step, target: Device | None, total: Comparison
) -> tuple[Prediction, ...]:
    """The whole model's times on `target`, else on every known GPU, with the plan made for that."""
    if target is not None:
        return (_predict(target, total.fused, total),)
    if tensors(given)[0].element_size() != 2:
        return ()
    found = []
    for known in devices.DEVICES.values():
        with _planning(known):
            fused, _ = _count(model, given, step, Counter())
        found.append(_predict(known, fused, total))
    return tuple(found)


def _predict(target: Device, fused: Traffic, total: Comparison) -> Prediction:
    programs = (fused, total.stock, total.compiled)
    sides = zip(programs, _SIDES, strict=True)
    return Prediction(target, *(devices.expect(program.operations, target, side) for program, side in sides))
