"""A chain in differentiable PyTorch: what the fused chain equals, its double backward, its stand-in if small."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import Chain, Norm, Step, StepTensors, layout
from .program import Convolution, Normalisation, Program

Tensor = torch.Tensor


def conv_norm(x: Tensor, tensors: StepTensors, step: Step, moves: bool = False) -> Tensor:
    """``bn(conv(x))``; running statistics are read where the step uses them, and moved if `moves`, as stock does."""
    in_channels_last = layout.suggests_channels_last(x) or layout.suggests_channels_last(tensors.weight)
    weight = layout.with_grad_strides(tensors.weight, in_channels_last) if moves else tensors.weight
    z = F.conv2d(x, weight, tensors.bias, *step.conv.args)
    return norm(z, tensors, step.norm, moves)


def norm(z: Tensor, tensors: StepTensors, settings: Norm, moves: bool = False) -> Tensor:
    """``bn(z)``; running statistics are read where it uses them, and moved if `moves`, as stock does."""
    running, momentum = (tensors.running_mean, tensors.running_var), 0.0
    if settings.batch_stats and not moves:
        running = (None, None)
    elif settings.batch_stats:
        momentum = _count(tensors, settings)
    return F.batch_norm(z, *running, tensors.gamma, tensors.beta, settings.batch_stats, momentum, settings.eps)


def _count(tensors: StepTensors, norm: Norm) -> float:
    """Count a batch, and how much it weighs in the running statistics; ``momentum=None``: as much as each before."""
    if tensors.num_batches_tracked is not None:
        tensors.num_batches_tracked.add_(1)
    if norm.momentum is not None:
        return norm.momentum
    return 0.0 if tensors.num_batches_tracked is None else 1.0 / float(tensors.num_batches_tracked)


def chain_output(
    chain: Chain,
    x: Tensor,
    residual: Tensor | None,
    sample_factor: Tensor | None,
    tensors: list[StepTensors],
    moves: bool = False,
) -> Tensor:
    """The chain's output by stock operations.

    `moves`: as stock's modules do it: the running statistics move, and what follows a batch norm works in place.
    """
    h = x
    for step, own in zip(chain.steps[:-1], tensors, strict=False):
        h = F.relu(conv_norm(h, own, step, moves), inplace=moves)
    y = conv_norm(h, tensors[len(chain.steps) - 1], chain.steps[-1], moves)
    if sample_factor is not None:
        y = y * sample_factor.to(y.dtype).view(-1, 1, 1, 1)
    if chain.shortcut is not None:
        residual = conv_norm(x, tensors[-1], chain.shortcut, moves)
    if residual is not None:
        y = y.add_(residual) if moves else y + residual
    y = F.relu(y, inplace=moves) if chain.relu else y
    return y if chain.pool is None else F.max_pool2d(y, *chain.pool.args)


def program_output(
    program: Program,
    x: Tensor,
    sample_factor: Tensor | None,
    tensors: list[StepTensors],
    moves: bool = False,
) -> Tensor:
    """A program's output by stock operations; `moves`: see :func:`chain_output`."""
    values = [x]
    for node, own in zip(program.nodes, tensors, strict=True):
        h = values[node.reads[0]]
        if isinstance(node, Convolution):
            y = F.conv2d(h, own.weight, own.bias, *node.conv.args)
        elif isinstance(node, Normalisation):
            y = norm(h, own, node.norm, moves)
        else:
            if node.sampled and sample_factor is not None:
                h = h * sample_factor.to(h.dtype).view(-1, 1, 1, 1)
            y = h + values[node.other]
        values.append(F.relu(y) if not isinstance(node, Convolution) and node.relu else y)
    return values[-1]
