"""Backward of a chain by stock operations: where it is differentiated again, batched, or reads what has moved since."""

from __future__ import annotations

import dataclasses

import torch

from ..backends import run
from . import Chain, StepTensors, regroup, stock
from .batch_norm import Affine
from .layout import is_transformed
from .saved import Saved, originals, version

Tensor = torch.Tensor
aten = torch.ops.aten


def counters(chain: Chain, tensors: list[StepTensors]) -> tuple[tuple[Tensor, int], ...]:
    """The counters of norms that used running statistics, and their versions: how to tell that these have moved."""
    found = zip(chain.all_steps, tensors, strict=True)
    frozen = [own.num_batches_tracked for step, own in found if not step.norm.batch_stats]
    return tuple((t, version(t)) for t in frozen if t is not None)


def is_needed(ctx, grad_out: Tensor) -> bool:
    """Whether this backward must be made of stock operations."""
    return torch.is_grad_enabled() or is_transformed(grad_out) or _moved(ctx)


def _moved(ctx) -> bool:
    """Whether somebody trained with the chain's norms since its forward in evaluation."""
    return any(version(counter) != before for counter, before in ctx.counters)


def gradients(ctx, grad_out: Tensor, saved: Saved) -> tuple[Tensor | None, ...]:
    """Gradients of the node's arguments behind its first two: x, residual, sample factor, and all tensors of steps.

    Where somebody trained with the norms since a forward in evaluation, they are of the running statistics as these
    are now, as in stock, which reads them again.
    """
    x, *flat = originals(saved.x, saved.tensors, ctx.aliased)
    create_graph, chain = torch.is_grad_enabled(), ctx.chain
    needs = ctx.needs_input_grad[2:]
    grad_residual = None
    with torch.enable_grad(), torch.autocast(grad_out.device.type, enabled=False):
        if ctx.has_residual:  # its value is in the mask, which is all that a gradient wants of it
            grad_out = grad_residual = _behind_relu(chain, grad_out, saved)
            chain = dataclasses.replace(chain, relu=False)
        tensors, moved = regroup(flat), _moved(ctx)
        if moved:
            found = zip(chain.all_steps, tensors, _affines(saved), strict=True)
            tensors = [_as_in_forward(own, bn, step.norm.eps) for step, own, bn in found]
        residual = x if chain.identity else None
        out = stock.chain_output(chain, x, residual, saved.sample_factor, tensors)
        for own, now in zip(tensors, saved.tensors, strict=True):
            if moved and own.running_mean is not None:  # not in place: autograd must not see it
                own.running_mean.data.copy_(now.running_mean)
                own.running_var.data.copy_(now.running_var)
        inputs = [x, None, None, *flat]
        wanted = [i for i, need in enumerate(needs) if need and i != 1]
        sources = [inputs[i] for i in wanted]
        grads = torch.autograd.grad(out, sources, grad_out, create_graph=create_graph, allow_unused=True)
    result: list[Tensor | None] = [None] * len(needs)
    for i, grad in zip(wanted, grads, strict=True):
        result[i] = grad
    result[1] = grad_residual if needs[1] else None
    return tuple(result)


def _behind_relu(chain: Chain, grad_out: Tensor, saved: Saved) -> Tensor:
    """The gradient of the residual: `grad_out` where the ReLU let the sum pass."""
    if not chain.relu:
        return grad_out
    mask = saved.out
    if mask is None:  # bits of a lazy join
        ones = torch.ones(grad_out.shape, dtype=saved.x.dtype, device=saved.x.device)
        ones = ones.contiguous(memory_format=torch.channels_last)
        mask = run("norm_add_relu_backward", ones, mask=saved.join.mask, backend=chain.backend)[0]
    return aten.threshold_backward(grad_out, mask, 0)


def _affines(saved: Saved) -> list[Affine]:
    """What forward made of each step's batch norm, the shortcut's last."""
    ends = [end for end in (saved.join.main, saved.join.shortcut) if end is not None]
    return [lazy.bn for lazy in saved.inner] + [end if isinstance(end, Affine) else end.bn for end in ends]


def _as_in_forward(own: StepTensors, bn: Affine, eps: float) -> StepTensors:
    """`own` with the running statistics that forward used, as tensors of their own."""
    if own.running_mean is None:
        return own
    dtype = own.running_mean.dtype
    var = bn.rstd.square().reciprocal() - eps
    return own._replace(running_mean=bn.mean.to(dtype, copy=True), running_var=var.to(dtype))
