"""Copies of models made of fake tensors, and steps of them: what they return may be any nest of results."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd

from .count import tensors

Tensor = torch.Tensor


def copied(model: nn.Module) -> nn.Module:
    """A copy, also of a model whose weights are computed from others, which ``copy.deepcopy`` refuses (pruning)."""
    held = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if not t.is_leaf})


def casting(place: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """What a step in `dtype` runs under: autocast if that has 16 bits, whoever has switched it on or off around."""
    return torch.autocast(place.type, dtype=dtype if dtype.itemsize == 2 else None, enabled=dtype.itemsize == 2)


def make_fake(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype, device: str | None = None) -> nn.Module:
    """`model` itself with every tensor in it replaced by a fake one of `dtype`.

    In 16 bits it is for a step under :func:`casting`, so what is float32 stays that, save weights of convolutions and
    linear layers: they are autocast's copies, which are not counted. Of no floating-point tensor the dtype changes.
    `device`: of all of them; None: their own, or the CPU for one without memory, which is planned for as on a CPU.
    """
    made: dict[int, Tensor] = {}  # a tensor shared by two modules stays one tensor

    def fake(t: Tensor, cast: bool) -> Tensor:
        if id(t) not in made:
            like = mode.from_tensor(t.detach())
            place = device or ("cpu" if t.is_meta else t.device)
            with mode:
                like = torch.empty_like(like, device=place)
            own = not t.is_floating_point() or (t.dtype == torch.float32 and dtype.itemsize == 2 and not cast)
            made[id(t)] = like.to(t.dtype if own else dtype)
        return made[id(t)]

    for module in model.modules():
        cast = isinstance(module, _ConvNd | nn.Linear)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter, cast), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer, cast)
        attributes = vars(module)  # constants, of the input's dtype, and weights that are computed from others
        attributes.update({name: fake(t, True) for name, t in attributes.items() if isinstance(t, Tensor)})
    return model


def gradients(out: object, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of all results in `out` that have one, with respect to `wanted`."""
    ends = [t for t in tensors(out) if t.requires_grad]
    if not ends or not wanted:
        return ()
    return torch.autograd.grad(ends, wanted, list(map(torch.empty_like, ends)), allow_unused=True)
