"""A chain in differentiable PyTorch: what the fused chain must equal, and its double backward."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..steps import Chain, Step, StepTensors

Tensor = torch.Tensor


def conv_norm(x: Tensor, tensors: StepTensors, step: Step) -> Tensor:
    """``bn(conv(x))``; running statistics are read where the step uses them and never moved."""
    z = F.conv2d(x, tensors.weight, tensors.bias, *step.conv.args)
    running = (None, None) if step.norm.batch_stats else (tensors.running_mean, tensors.running_var)
    return F.batch_norm(z, *running, tensors.gamma, tensors.beta, step.norm.batch_stats, 0.0, step.norm.eps)


def chain_output(
    chain: Chain,
    x: Tensor,
    residual: Tensor | None,
    sample_factor: Tensor | None,
    tensors: list[StepTensors],
) -> Tensor:
    """The chain's output by stock operations."""
    h = x
    for step, own in zip(chain.steps[:-1], tensors, strict=False):
        h = F.relu(conv_norm(h, own, step))
    y = conv_norm(h, tensors[len(chain.steps) - 1], chain.steps[-1])
    if sample_factor is not None:
        y = y * sample_factor.to(y.dtype).view(-1, 1, 1, 1)
    if chain.shortcut is not None:
        residual = conv_norm(x, tensors[-1], chain.shortcut)
    if residual is not None:
        y = y + residual
    y = F.relu(y) if chain.relu else y
    return y if chain.pool is None else F.max_pool2d(y, *chain.pool.args)
