"""Which of this package's ops a step of a model calls, with the forms of their arguments: found on fake tensors."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import cards, opaque
from ..convert.fuse import fuse
from ..ops import OPS, Op
from ..plan import choose, devices
from ..plan.devices import Device
from .faked import casting, copied, gradients, make_fake

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
    """One distinct call of an op: by name its arguments, in the order of its schema, tensors as :class:`Spec`."""

    op: str
    arguments: tuple[tuple[str, object], ...]

    @property
    def args(self) -> tuple:
        """All of them by position, with meta tensors: bytes, FLOPs and launches can be counted from them."""
        return tuple(value.empty() if isinstance(value, Spec) else value for _, value in self.arguments)

    @property
    def contract(self) -> Op:
        return OPS[self.op]

    @property
    def label(self) -> str:
        """The first tensors' shapes, then what else was passed."""
        specs = [value for _, value in self.arguments if isinstance(value, Spec)]
        shapes = " ".join("x".join(map(str, spec.shape)) for spec in specs if len(spec.shape) > 1)
        vectors = " ".join(spec.name for spec in specs if len(spec.shape) == 1)
        others = " ".join(f"{name}={value}" for name, value in self.arguments if not isinstance(value, Spec | None))
        return "; ".join(text for text in (shapes, vectors, others) if text)


class _Listener(TorchDispatchMode):
    """Notes the calls of ops; fake tensors lend their forms."""

    sees_fused_ops = True

    def __init__(self, incomplete: bool) -> None:
        super().__init__()
        self.found: dict[Call, int] = {}
        self.incomplete = incomplete

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == opaque.NAMESPACE:
            for call in _calls_of(func, args, kwargs, self.incomplete):
                self.found[call] = self.found.get(call, 0) + 1
        return func(*args, **kwargs)


def _calls_of(func: torch._ops.OpOverload, args: tuple, kwargs: dict, incomplete: bool) -> list[Call]:
    """One op, or those that it stands for."""
    name = func._schema.name.split("::")[1]
    if OPS[name].parts is None:
        return [Call(name, _arguments(func._schema, args, kwargs))]
    room = getattr(torch.ops, opaque.NAMESPACE)
    parts = [(part, getattr(room, part).default._schema, given) for part, given in OPS[name].parts(*args)]
    wanted = [each for each in parts if incomplete or _is_whole(*each[1:])]
    return [Call(part, _arguments(schema, given, {})) for part, schema, given in wanted]


def _is_whole(schema: torch.FunctionSchema, given: tuple) -> bool:
    """Whether these arguments make a call: a chain's join with its projection has no scales, which its kernel makes."""
    pairs = zip(schema.arguments, given, strict=False)
    return all(value is not None or str(argument.type).startswith("Optional") for argument, value in pairs)


def _arguments(schema: torch.FunctionSchema, args: tuple, kwargs: dict) -> tuple[tuple[str, object], ...]:
    """By name, in order, up to the last one given; one left out before it has its default."""
    passed = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    declared = [argument for argument in schema.arguments if argument.name != "backend"]
    last = max((i for i, argument in enumerate(declared) if argument.name in passed), default=-1)
    given = ((a.name, passed.get(a.name, a.default_value)) for a in declared[: last + 1])
    return tuple((name, _form(name, value)) for name, value in given)


def _form(name: str, value: object) -> object:
    """What of an argument makes a call another one."""
    if isinstance(value, Tensor):
        return Spec(name, tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(value) if isinstance(value, (list, tuple)) else value


def device_of(card: cards.Card) -> Device:
    """The known board of nearest capability, to plan for."""
    return min(devices.DEVICES.values(), key=lambda d: abs(10 * d.capability[0] + d.capability[1] - card.arch))


def calls(
    model: nn.Module,
    x: Tensor,
    training: bool = True,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    incomplete: bool = False,
) -> dict[Call, int]:
    """The distinct calls of ops in a step of `model` on one like `x`, planned for `device`: how often each.

    `model` is not touched and need not be fused. `x` may be a meta tensor. `dtype`: of activations, that of autocast;
    None: of `x`. `incomplete`: also the parts of chains that leave to their kernel what the op itself demands.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model with nothing to fuse calls nothing
        fused = fuse(copied(model)).train(training)
    mode, listener = FakeTensorMode(allow_non_fake_inputs=True), _Listener(incomplete)
    fake = make_fake(fused, mode, dtype or x.dtype, "cpu")
    with mode, choose.planning_for(device or devices.CPU_CORE), torch.set_grad_enabled(training):
        shape, own = tuple(x.shape), dtype or x.dtype
        given = torch.empty(shape, dtype=own).contiguous(memory_format=torch.channels_last)
        with listener:
            with casting(given.device, own):
                out = fake(given)
            if training:
                gradients(out, [p for p in fake.parameters() if p.requires_grad])
    return listener.found
