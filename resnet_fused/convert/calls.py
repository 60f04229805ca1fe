"""Which of this package's ops a step of a model calls, with the forms of their arguments: found on fake tensors."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import cards, opaque
from ..blocks import devices, plan
from ..blocks.devices import Device
from .explain import _make_fake
from .fuse import fuse

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op: tensors are meta tensors."""

    op: str
    args: tuple
    kwargs: dict


class _Listener(TorchDispatchMode):
    """Notes the calls of ops; fake tensors lend their forms."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == opaque.NAMESPACE:
            given = {name: _form(value) for name, value in kwargs.items() if name != "backend"}
            self.calls.append(Call(func._schema.name.split("::")[1], tuple(map(_form, args)), given))
        return func(*args, **kwargs)


def _form(value):
    """Sizes, strides and dtype of a fake tensor, to be made a meta tensor of outside of the fake mode."""
    return ("form", value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


def _meta(value):
    if not (isinstance(value, tuple) and value[:1] == ("form",)):
        return value
    return torch.empty_strided(*value[1:3], dtype=value[3], device="meta")


def device_of(card: cards.Card) -> Device:
    """The known board of nearest capability, to plan for."""
    return min(devices.DEVICES.values(), key=lambda d: abs(10 * d.capability[0] + d.capability[1] - card.arch))


def calls(
    model: nn.Module, x: Tensor, training: bool = True, device: Device | None = None, dtype: torch.dtype | None = None
) -> list[Call]:
    """The calls of ops in a step of `model` on an input like `x`, as planned for `device`; each different one once.

    `model` is not touched and need not be fused. `x` may be a meta tensor. `dtype`: of activations, that of autocast;
    None: of `x`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model with nothing to fuse calls nothing
        fused = fuse(copy.deepcopy(model).cpu()).train(training)
    mode, listener = FakeTensorMode(), _Listener()
    fake = _make_fake(fused, mode, dtype or x.dtype)
    with mode, plan.planning_for(device or devices.CPU_CORE), torch.set_grad_enabled(training):
        shape, own = tuple(x.shape), dtype or x.dtype
        given = torch.empty(shape, dtype=own).contiguous(memory_format=torch.channels_last)
        with listener:
            out = fake(given)
            wanted = [p for p in fake.parameters() if p.requires_grad]
            if training and wanted and out.requires_grad:
                torch.autograd.grad(out, wanted, torch.empty_like(out), allow_unused=True)
    different: dict[str, Call] = {}
    for call in listener.calls:
        different.setdefault(repr((call.op, call.args, call.kwargs)), call)
    return [
        Call(call.op, tuple(map(_meta, call.args)), {name: _meta(value) for name, value in call.kwargs.items()})
        for call in different.values()
    ]
