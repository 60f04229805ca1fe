"""A program in differentiable PyTorch: what its steps equal, their double backward, their stand-in if small."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import activation
from . import layout
from .program import Addition, Averaging, Call, Concatenation, Convolution, Node, Normalisation
from .spec import Act, Norm, StepTensors


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


def program_output(call: Call, moves: bool = False, known: dict[int, Tensor] | None = None) -> Tensor:
    """The output of a program by stock operations.

    `moves`: as stock's modules do it: the running statistics move, and what follows a batch norm works in place.
    `known`: values that are not to be computed again. Without a residual its addition adds nothing.
    """
    program, values = call.program, dict(enumerate(call.inputs))
    for (number, node), own in zip(program.numbered, call.tensors, strict=True):
        if known is not None and number in known:
            values[number] = known[number]
        else:
            values[number] = _node_output(node, own, values, call.sample_factor, moves)
    return values[program.output]


def _node_output(
    node: Node, own: StepTensors, values: dict[int, Tensor], sample_factor: Tensor | None, moves: bool
) -> Tensor:
    h = values[node.reads[0]]
    if isinstance(node, Convolution):
        in_channels_last = layout.suggests_channels_last(h) or layout.suggests_channels_last(own.weight)
        weight = layout.with_grad_strides(own.weight, in_channels_last) if moves else own.weight
        return F.conv2d(h, weight, own.bias, *node.conv.args)
    if isinstance(node, Normalisation):
        h = _sampled(norm(h, own, node.norm, moves), node.sampled, sample_factor)
        h = h if node.act is None else activated(h, node.act, moves)
        return F.relu(h, inplace=moves) if node.relu else h
    if isinstance(node, Concatenation):
        return torch.cat([values[value] for value in node.reads], 1)
    if isinstance(node, Averaging):
        return F.avg_pool2d(h, *node.average.args)
    if not isinstance(node, Addition):
        return F.max_pool2d(h, *node.pool.args)
    other = values[node.other]
    alike = other is not None and (h.shape, h.dtype) == (other.shape, other.dtype)
    y = add(node, h, other, sample_factor, inplace=moves and alike)  # nobody else reads a branch
    return F.relu(y, inplace=moves) if node.relu else y


def add(node: Addition, branch: Tensor, other: Tensor | None, factor: Tensor | None, inplace: bool) -> Tensor:
    """A sum without its ReLU; None is nothing. `inplace`: where the result is of another dtype or shape, it raises."""
    branch = _sampled(branch, node.sampled, factor)
    if other is None:
        return branch
    if node.other_first:
        return other + branch
    return branch.add_(other) if inplace else branch + other


def activated(y: Tensor, act: Act, owned: bool) -> Tensor:
    """An activation of `y`; in its memory if that is `owned` and autograd does not have to keep a copy of it."""
    keeps_result = act.code in (activation.LEAKY_RELU, activation.RELU6)
    return activation.value(y, *act.args, inplace=owned and (keeps_result or not y.requires_grad))


def _sampled(y: Tensor, sampled: bool, sample_factor: Tensor | None) -> Tensor:
    return y * sample_factor.to(y.dtype).view(-1, 1, 1, 1) if sampled and sample_factor is not None else y
