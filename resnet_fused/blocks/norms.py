"""Read a batch-norm module, of whatever class, as the settings and tensors of a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..steps import Norm
from . import proven


def is_frozen_class(module: nn.Module) -> bool:
    """A batch norm whose parameters are buffers: it never uses the batch's statistics."""
    return proven.kind(module) in proven.FROZEN_NORMS


def activation_of(module: nn.Module) -> nn.Module | None:
    """The activation inside a batch norm of timm's combined class, else None."""
    return module.act if proven.kind(module) in proven.ACTIVATED_NORMS else None


def is_norm(module: nn.Module) -> bool:
    """Whether `module` normalises, in whatever way, so that :func:`why_not` tells something."""
    return not why_not(module) or "norm" in type(module).__name__.lower()


def why_not(module: nn.Module) -> str:
    """Why `module` is not a batch norm this package can fuse; empty if it is one."""
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm needs the statistics of other processes"
    kind = proven.kind(module)
    if kind in proven.FROZEN_NORMS or kind in proven.ACTIVATED_NORMS:
        drop = getattr(module, "drop", None)
        if drop is not None and proven.why_changed(drop, nn.Identity):
            return f"its norm drops with {type(drop).__name__}"
        if kind in proven.ACTIVATED_NORMS and (drop is None or getattr(module, "act", None) is None):
            return "its norm has lost its drop or its activation"
        return proven.why_changed(module)
    if isinstance(module, nn.BatchNorm2d):
        return proven.why_changed(module, nn.BatchNorm2d)
    return f"{type(module).__name__} is not batch norm"


def obstacle(module: nn.Module) -> str:
    """Why the settings that a batch norm has now are better left to stock, whose errors they may raise."""
    if not isinstance(module.eps, float | int) or not module.eps > 0:
        return "a batch norm whose eps is no positive number"
    _, _, running_mean, running_var = vectors(module)
    if (running_mean is None) != (running_var is None):
        return "a batch norm with one running statistic alone"
    if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):
        return "running statistics that require gradients"
    if is_frozen_class(module):
        return ""
    if running_mean is None and module.track_running_stats and module.num_batches_tracked is not None:
        return "a batch norm that counts batches and has no running statistics"
    if module.momentum is None:
        if module.training and module.track_running_stats and module.num_batches_tracked is None:
            return "a cumulative average that is not counted"
    elif not isinstance(module.momentum, float | int):
        return f"a momentum of class {type(module.momentum).__name__}"
    return ""


def vectors(module: nn.Module) -> tuple[Tensor | None, ...]:
    """``gamma, beta, running_mean, running_var``, whichever this call may read."""
    if not torch.compiler.is_compiling():  # a module's __getattr__ is Python: four calls of it take 3 us
        parameters, buffers = module.__dict__["_parameters"], module.__dict__["_buffers"]
        if "weight" in parameters and "bias" in parameters and "running_mean" in buffers and "running_var" in buffers:
            return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
    return module.weight, module.bias, module.running_mean, module.running_var


def settings(module: nn.Module) -> Norm:
    """Eps, momentum and whether this call normalises with the batch: what stock's forward would do now."""
    if is_frozen_class(module):
        return Norm(module.eps, None, False)
    batch_stats = bool(module.training) or (module.running_mean is None and module.running_var is None)
    return Norm(module.eps, module.momentum, batch_stats)


def tensors(module: nn.Module) -> tuple[Tensor | None, ...]:
    """``gamma, beta, running_mean, running_var, num_batches_tracked`` that this call reads or moves.

    In evaluation the counter tells, in backward, whether the statistics have been moved since.
    """
    gamma, beta, running_mean, running_var = vectors(module)
    if is_frozen_class(module):
        return gamma, beta, running_mean, running_var, None
    if not module.track_running_stats if module.training else running_mean is None:  # statistics that nothing counts
        return gamma, beta, None, None, None
    return gamma, beta, running_mean, running_var, module.num_batches_tracked


def channels(module: nn.Module) -> int:
    """How many channels a batch norm takes."""
    return module.weight.numel() if is_frozen_class(module) else module.num_features
