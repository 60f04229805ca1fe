"""The modules that a whole program stands in for, and whether this call may bypass them: :mod:`.site` for programs."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..steps.program import Addition, Convolution, Node, Normalisation, Program
from ..steps.spec import Conv, Norm, StepTensors
from . import norms
from .site import conv_geometry, hooked, is_odd, is_plain, why_not_conv, why_not_passed

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Shape:
    """A program without its settings: nodes with names of modules in the place of geometry and norms. Plain data."""

    nodes: tuple[Node, ...]  # settings of convolutions and norms are filled in at each call
    names: tuple[str, ...]  # of each node's module; "" for additions
    bypassed: tuple[tuple[str, str], ...] = ()  # modules that are not called either: name and class
    drop_path: str | None = None


@dataclasses.dataclass(frozen=True)
class ProgramSite:
    """The modules of a :class:`Shape` in a block."""

    shape: Shape
    modules: tuple[nn.Module | None, ...]  # of each node
    bypassed: tuple[nn.Module, ...]
    backend: str = "auto"
    kept: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)  # by settings: how it runs


def obstacle(site: ProgramSite) -> str:
    """Why the modules of `site` must be called one by one; empty if they may be bypassed."""
    for node, module in zip(site.shape.nodes, site.modules, strict=True):
        reason = _module_obstacle(node, module, site)
        if reason:
            return reason
    for (name, kind), module in zip(site.shape.bypassed, site.bypassed, strict=True):
        if type(module).__name__ != kind:
            return f"{name} was changed after fuse(); call fuse() again"
        reason = why_not_passed(module)
        if reason or hooked(module):
            return reason or "hooks on an activation or shortcut"
    return _tensor_obstacle(site)


def _module_obstacle(node: Node, module: nn.Module | None, site: ProgramSite) -> str:
    if isinstance(node, Addition):
        return ""
    if hooked(module):
        return "hooks on a convolution or batch norm"
    if isinstance(node, Convolution):
        return why_not_conv(module)
    reason = norms.why_not(module) or norms.obstacle(module)
    if reason:
        return reason
    act = norms.activation_of(module)
    if act is not None and all(act is not other for other in site.bypassed):
        return "a norm with an activation of its own"
    return ""


def _tensor_obstacle(site: ProgramSite) -> str:
    """Why the parameters are not those of one program: another class, device, dtype or shape than fit together."""
    first = next(module for module in site.modules if isinstance(module, nn.Conv2d)).weight
    channels: list[int | None] = [None]  # of each value; None: the input's, which its first reader says
    for node, module in zip(site.shape.nodes, site.modules, strict=True):
        entering = channels[node.reads[0]]
        if isinstance(node, Addition):
            channels.append(entering)
            continue
        is_conv = isinstance(node, Convolution)
        takes = module.weight.size(1) * module.groups if is_conv else norms.channels(module)
        if entering is None:
            channels[node.reads[0]] = entering = takes
        if takes != entering:
            return "a module that does not take what comes before it"
        weight, tensors = (module.weight, (module.bias,)) if is_conv else (None, norms.vectors(module))
        channels.append(takes if weight is None else weight.size(0))
        reason = _parameter_obstacle(weight, tensors, channels[-1], first)
        if reason:
            return reason
    return ""


def _parameter_obstacle(weight: Tensor | None, vectors: tuple[Tensor | None, ...], channels: int, first: Tensor) -> str:
    """Why a node's parameters do not fit: a convolution's have the dtype of `first`, a norm's may be wider."""
    dtype, is_conv = first.dtype, weight is not None
    allowed = (dtype,) if is_conv or dtype.itemsize != 2 else (dtype, torch.float32)
    if not is_conv and len({t.dtype for t in vectors if t is not None}) > 1:
        return "a batch norm of several dtypes"
    for t in (weight, *vectors):
        if t is None:
            continue
        if t.device != first.device:
            return "parameters on several devices"
        if not is_plain(t):
            return f"a parameter of class {type(t).__name__}"
        if is_odd(t):
            return "a parameter of an unusual layout"
        if t.dtype not in allowed:
            return "parameters of different dtypes"
        if t.dim() != (4 if t is weight else 1) or (t is not weight and t.numel() != channels):
            return "a norm and a convolution of different widths"
    return ""


def normalises_with_batch(site: ProgramSite) -> bool:
    """Whether every batch norm of `site` would normalise with the batch now."""
    return all(own.batch_stats for own in settings_of(site) if isinstance(own, Norm))


def channels_of(site: ProgramSite) -> int:
    """Channels of the input."""
    pairs = zip(site.shape.nodes, site.modules, strict=True)
    first, module = next((n, m) for n, m in pairs if 0 in n.reads and not isinstance(n, Addition))
    return module.weight.size(1) * module.groups if isinstance(first, Convolution) else norms.channels(module)


def settings_of(site: ProgramSite) -> tuple[Conv | Norm | None, ...]:
    """What each node's module is set to now."""
    found: list[Conv | Norm | None] = []
    for node, module in zip(site.shape.nodes, site.modules, strict=True):
        if isinstance(node, Convolution):
            found.append(conv_geometry(module))
        else:
            found.append(norms.settings(module) if isinstance(node, Normalisation) else None)
    return tuple(found)


def program_of(site: ProgramSite, settings: tuple[Conv | Norm | None, ...], backend: str) -> Program:
    """The program of `site` with these settings."""
    nodes: list[Node] = []
    for node, own in zip(site.shape.nodes, settings, strict=True):
        if own is not None:
            node = dataclasses.replace(node, **{"conv" if isinstance(node, Convolution) else "norm": own})
        nodes.append(node)
    return Program(tuple(nodes), backend)


def tensors_of(site: ProgramSite) -> list[StepTensors]:
    """The tensors of each node."""
    found = []
    for node, module in zip(site.shape.nodes, site.modules, strict=True):
        if isinstance(node, Convolution):
            found.append(StepTensors(module.weight, module.bias))
        elif isinstance(node, Normalisation):
            found.append(StepTensors(None, None, *norms.tensors(module)))
        else:
            found.append(StepTensors(None))
    return found
