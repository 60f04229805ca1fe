"""The calls of our ops that a fused model makes, each distinct one once, and random tensors to make them with.

A training step or an evaluation runs on fake tensors, planned for the device at hand as ``explain`` does it: what comes
out is every launch's arguments, with their real shapes, and how often the model needs each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused

from ...backends import opaque
from ...blocks import devices, plan
from ...ops import OPS, Op
from .. import named
from .context import Context

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor's form."""

    name: str  # of the argument
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        """A tensor without values, for what only asks for shapes."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@dataclasses.dataclass(frozen=True)
class Call:
    """One distinct call of an op: by name its arguments, tensors as :class:`Spec`."""

    op: str
    arguments: tuple[tuple[str, object], ...]

    @property
    def label(self) -> str:
        """The first tensors' shapes, then what else was passed."""
        specs = [value for _, value in self.arguments if isinstance(value, Spec)]
        shapes = " ".join("x".join(map(str, spec.shape)) for spec in specs if len(spec.shape) > 1)
        vectors = " ".join(spec.name for spec in specs if len(spec.shape) == 1)
        others = " ".join(f"{name}={value}" for name, value in self.arguments if not isinstance(value, Spec | None))
        return "; ".join(text for text in (shapes, vectors, others) if text)

    @property
    def contract(self) -> Op:
        return OPS[self.op]

    def without_values(self) -> tuple:
        """Arguments from which bytes and FLOPs can be counted."""
        return tuple(value.empty() if isinstance(value, Spec) else value for _, value in self.arguments)

    def drawn(self, generator: torch.Generator) -> tuple:
        """Arguments for a real call on the device of `generator`, drawn anew; all of them by position."""
        window = math.prod(dict(self.arguments).get("kernel") or (3, 3))
        given = {n: draw(v, generator, window) if isinstance(v, Spec) else v for n, v in self.arguments}
        if self.op.startswith("gram_"):
            consistent_gram(given, generator)
        return tuple(given.values())


class Recorder(TorchDispatchMode):
    """Notes the calls of our ops while it is on."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Call, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == opaque.NAMESPACE:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | {k: v for k, v in (kwargs or {}).items() if k != "backend"}
            arguments = tuple((name, form(name, value)) for name, value in given.items())
            call = Call(func._schema.name.split("::")[1], arguments)
            self.found[call] = self.found.get(call, 0) + 1
        return func(*args, **(kwargs or {}))


def form(name: str, value: object) -> object:
    """What of an argument makes a call another one."""
    if isinstance(value, Tensor):
        return Spec(name, tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(value) if isinstance(value, (list, tuple)) else value


def calls_of(context: Context, name: str, training: bool) -> dict[Call, int]:
    """The distinct calls of a fused model's step, or of its evaluation, with how often each is made."""
    settings = context.settings
    model = resnet_fused.fuse(named.build(name)).to(memory_format=torch.channels_last).train(training)
    target = plan.planning_for(devices.of(context.device)) if context.on_gpu else plan.fusing_all()
    mode = FakeTensorMode()
    fake_parameters(model, mode, settings.dtype)
    with mode, target, Recorder() as recorder, torch.set_grad_enabled(training):
        x = torch.empty(settings.batch, 3, settings.size, settings.size, dtype=settings.dtype)
        out = model(x.contiguous(memory_format=torch.channels_last))
        if training:
            out.sum().backward()
    return recorder.found


def fake_parameters(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Replace the tensors of `model` by fake ones, as autocast to `dtype` hands them on: norms keep their own dtype."""
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    narrow = tensor.is_floating_point() and not norm
                    made = mode.from_tensor(tensor.detach()).to(dtype if narrow else tensor.dtype)
                    is_parameter = store is module._parameters
                    store[name] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made


# Drawing --------------------------------------------------------------------------------------------------------


def draw(spec: Spec, generator: torch.Generator, window: int) -> Tensor:
    """Random numbers on a grid on which signs are the same in every arithmetic, as the self-check's cases have them."""
    device = generator.device

    def grid(steps: int, step: float) -> Tensor:
        drawn = torch.randint(-steps, steps + 1, spec.shape, generator=generator, device=device, dtype=torch.int8)
        return drawn.to(spec.dtype).mul_(step)

    if spec.dtype == torch.uint8:
        top = window if spec.name == "index" else 256
        drawn = torch.randint(0, top, spec.shape, generator=generator, device=device, dtype=torch.uint8)
    elif spec.name == "sample_factor":
        drawn = 2 * torch.randint(0, 2, spec.shape, generator=generator, device=device).to(spec.dtype)
    elif spec.name in ("m2", "var", "running_var", "invstd"):
        drawn = grid(32, 0.0625).abs_().add_(0.5)
    elif "weight" in spec.name or spec.name == "coupling":
        drawn = grid(8, 1 / 32)
    else:
        drawn = grid(32, 0.125 if len(spec.shape) == 4 else 0.0625)
    return laid_out(drawn, spec)


def laid_out(drawn: Tensor, spec: Spec) -> Tensor:
    """`drawn` with the strides of `spec`."""
    if drawn.stride() == spec.stride:
        return drawn
    return drawn.new_empty_strided(spec.shape, spec.stride).copy_(drawn)


def consistent_gram(given: dict[str, object], generator: torch.Generator) -> None:
    """A Gram matrix and sums of one random matrix in place of unrelated draws, whose variances would be negative."""
    gram = given["gram"]
    channels, rows = gram.shape[0], 4 * gram.shape[0]
    a = given["a"]
    pixels = a.shape[0] * a.shape[2] * a.shape[3]
    d = torch.randn(rows, channels, generator=generator, device=gram.device, dtype=torch.float64)
    given["gram"] = ((d.T @ d) * (pixels / rows)).to(gram.dtype)
    given["total"] = (d.sum(0) * (pixels / rows)).to(gram.dtype)


def changed(arguments: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    """`arguments` with `change` made to every tensor."""
    return tuple(change(value) if isinstance(value, Tensor) else value for value in arguments)


def widened(t: Tensor) -> Tensor:
    """`t` in float64, bits as they are."""
    return t.double() if t.is_floating_point() else t
