"""Read a batch-norm module, of whatever class, as the settings and tensors of a step."""

from __future__ import annotations

import torch
from torch import nn

from ..steps import Norm

Tensor = torch.Tensor

#: Classes elsewhere that mean batch norm with buffers for parameters; by name, so that nothing is imported for them.
_FROZEN = {("torchvision.ops.misc", "FrozenBatchNorm2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d")}
_WITH_ACTIVATION = {("timm.layers.norm_act", "BatchNormAct2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d")}


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def is_frozen_class(module: nn.Module) -> bool:
    """A batch norm whose parameters are buffers: it never uses the batch's statistics."""
    return _kind(module) in _FROZEN


def activation_of(module: nn.Module) -> nn.Module | None:
    """The activation inside a batch norm of timm's combined class, else None."""
    return module.act if _kind(module) in _WITH_ACTIVATION else None


def why_not(module: nn.Module) -> str:
    """Why `module` is not a batch norm this package can fuse; empty if it is one."""
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm needs the statistics of other processes"
    if is_frozen_class(module) or _kind(module) in _WITH_ACTIVATION:
        drop = getattr(module, "drop", None)
        return "" if drop is None or isinstance(drop, nn.Identity) else f"its norm drops with {type(drop).__name__}"
    if isinstance(module, nn.BatchNorm2d) and type(module).forward is nn.BatchNorm2d.forward:
        return ""
    return f"{type(module).__name__} is not batch norm"


def settings(module: nn.Module) -> Norm:
    """Eps, momentum and whether this call normalises with the batch: what stock's forward would do now."""
    if is_frozen_class(module):
        return Norm(module.eps, None, False)
    batch_stats = module.training or (module.running_mean is None and module.running_var is None)
    return Norm(module.eps, module.momentum, batch_stats)


def tensors(module: nn.Module) -> tuple[Tensor | None, ...]:
    """``gamma, beta, running_mean, running_var, num_batches_tracked`` that this call reads or moves."""
    gamma, beta = module.weight, module.bias
    if is_frozen_class(module):
        return gamma, beta, module.running_mean, module.running_var, None
    moves = module.training and module.track_running_stats
    if module.training and not moves:
        return gamma, beta, None, None, None
    return gamma, beta, module.running_mean, module.running_var, module.num_batches_tracked if moves else None


def channels(module: nn.Module) -> int:
    """How many channels a batch norm takes."""
    return module.weight.numel() if is_frozen_class(module) else module.num_features
