"""A chain of steps as one autograd node.

Forward saves, of all the activations it makes, the raw convolution outputs of the inner steps (and of the last one
where its join is plain) and its own output, which the next block saves anyway. Everything else is recomputed on the way
back from per-channel vectors.
"""

from __future__ import annotations

import dataclasses

import torch

from ..ops import stat_dtype
from . import Chain, Lazy, StepGrads, StepTensors, conv_norm, flatten, join, lazy_program, regroup, replay, stock
from .conv import channels_last
from .layout import is_channels_last, restrided, worked_on
from .running import update_running_all
from .saved import Kept, Recorder, Saved, counter_of, keep, layouts_of, refuses_inference_tensors, unpacked

Tensor = torch.Tensor


def _forward(chain, x, residual, sample_factor, tensors):
    """Run the chain. Returns output, inner lazies, join state, and the statistics of every batch norm in order."""
    if chain.lazy:
        return lazy_program.forward(chain, x, residual, sample_factor, tensors)
    h, inner, statistics, previous = x, [], [], None
    for step, own in zip(chain.steps[:-1], tensors, strict=False):
        z, bn, stats = conv_norm.forward(h, own, step, chain.backend)
        inner.append(Lazy(z, bn))
        statistics.append(stats)
        h, previous = inner[-1].materialise(chain.backend), bn
    residual = x if chain.identity else residual
    out, state, join_statistics = join.forward(chain, h, x, tensors, residual, sample_factor, previous)
    return out, inner, state, statistics + join_statistics


class FusedChain(torch.autograd.Function):
    """Autograd node of a :class:`~resnet_fused.steps.Chain`; use :func:`run_chain`."""

    @staticmethod
    def forward(
        ctx, chain: Chain, given: Tensor | None, x: Tensor, residual: Tensor | None, sample_factor: Tensor | None, *flat
    ):
        tensors = regroup(flat)
        out, inner, state, statistics = _forward(chain, x, residual, sample_factor, tensors)
        seen = zip(chain.all_steps, tensors, statistics, strict=True)
        # only now, when nothing can fail any more
        update_running_all([(own, step.norm, *stats) for step, own, stats in seen if stats is not None])
        has_residual = residual is not None or chain.from_input
        mask = out if chain.relu and (has_residual or chain.gram) and not chain.lazy else None
        written = None
        if torch.compiler.is_compiling():
            kept, ctx.counters = _keep_all(chain, x, tensors), ()
        else:
            if chain.relu and chain.pool is None and mask is None:
                written = counter_of(out)  # stock saves it, and notices writes to it
            needs = [tuple(group[:4]) for group in regroup(ctx.needs_input_grad[5:])]
            kept = keep(chain, x, given, tensors, needs, ctx.needs_input_grad[2])
            ctx.counters = replay.counters(chain, tensors)
        recorder = Recorder(Saved(kept.x, kept.given, sample_factor, mask, written, kept.tensors, inner, state))
        ctx.save_for_backward(*recorder.flat)
        ctx.layouts = layouts_of(recorder.flat)
        ctx.shape, ctx.chain, ctx.aliased, ctx.has_residual = recorder.shape, chain, kept.aliased, residual is not None
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        saved: Saved = Recorder.rebuild(ctx.shape, unpacked(ctx.saved_tensors, ctx.layouts))
        if replay.is_needed(ctx, grad_out):
            return None, None, *replay.gradients(ctx, grad_out, saved)
        chain, n = ctx.chain, len(ctx.chain.steps)
        grad_out = channels_last(grad_out.to(saved.x.dtype))
        needs = [StepGrads(*group[:4]) for group in regroup(ctx.needs_input_grad[5:])]
        needs_x, needs_residual = ctx.needs_input_grad[2:4]
        has_residual = ctx.has_residual or chain.from_input
        reach = [needs_x]  # reach[i]: whether anything before step i wants a gradient
        for need in needs[: n - 1]:
            reach.append(reach[-1] or any(need))
        if chain.lazy:
            grad_x, residual, grads = lazy_program.backward(
                chain, grad_out, saved.x, saved.inner, saved.tensors, saved.join, saved.sample_factor, needs, reach,
                needs_residual,
            )  # fmt: skip
            return None, None, grad_x, residual, None, *_flat_grads(grads, saved.tensors)
        h = saved.inner[-1].materialise(chain.backend) if n > 1 else saved.x
        out = join.backward(
            chain, grad_out, saved.out, h, saved.x, saved.tensors, saved.join, has_residual, saved.sample_factor,
            needs, reach[n - 1], needs_residual or (chain.from_input and needs_x),
        )  # fmt: skip
        grads, grad_h = [out.main], out.h
        merge = chain.from_input and needs_x
        dense = merge and out.residual.shape == saved.x.shape and n > 1  # then the first convolution adds to it
        for i in reversed(range(n - 1)):
            if not (reach[i] or any(needs[i])):
                grads.append(StepGrads())
                continue
            lazy, step = saved.inner[i], chain.steps[i]
            value = conv_norm.mask_and_sum(grad_h, lazy.z, lazy.bn, step, chain.backend)
            h = saved.inner[i - 1].materialise(chain.backend) if i else saved.x
            add_to = out.residual if i == 0 and dense else None
            dz = value.materialise(chain.backend, into_g=True)
            grad_h, step_grads = conv_norm.backward(
                dz, h, saved.tensors[i], step, value.coefficients, chain.backend, needs[i], reach[i], add_to
            )
            grads.append(step_grads)
        if merge and not dense:
            grad_h = join.add_residual_grad(grad_h, out.residual, chain)
        grads.reverse()
        if chain.shortcut is not None:
            grads.append(out.shortcut)
        residual = out.residual if needs_residual else None
        return None, None, grad_h if needs_x else None, residual, None, *_flat_grads(grads, saved.tensors)


def _flat_grads(grads: list[StepGrads], tensors: list[StepTensors]) -> list[Tensor | None]:
    """Gradients in the order of :func:`flatten`, each in its tensor's dtype."""
    flat: list[Tensor | None] = []
    for grad, own in zip(grads, tensors, strict=True):
        for value, tensor in zip(grad, own[:4], strict=True):
            flat.append(None if value is None or tensor is None else restrided(value.to(tensor.dtype), tensor))
        flat += [None] * (len(own) - 4)
    return flat


def _keep_all(chain: Chain, x: Tensor, tensors: list[StepTensors]) -> Kept:
    """While a graph is traced: its compiler decides what lives until backward, and what writes to it."""
    frozen = [not step.norm.batch_stats for step in chain.all_steps]
    kept = [
        own._replace(
            running_mean=own.running_mean if used else None,
            running_var=own.running_var if used else None,
            num_batches_tracked=None,
        )
        for own, used in zip(tensors, frozen, strict=True)
    ]
    return Kept(x, None, kept, ())


def run_chain(
    chain: Chain,
    x: Tensor,
    tensors: list[StepTensors],
    residual: Tensor | None = None,
    sample_factor: Tensor | None = None,
) -> Tensor:
    """The output of `chain` on `x`, as one autograd node.

    Args:
        chain: the program; its variants (Gram joins) have been chosen.
        x: ``[N, C, H, W]``, any layout; worked on in channels_last.
        tensors: one :class:`StepTensors` for each step, the shortcut's last. Weights in the dtype of `x`.
        residual: ``[N, K, H', W']`` or None; what is added before the last ReLU.
        sample_factor: ``[N]`` or None; multiplies the main branch (Stochastic Depth).
    """
    if chain.stock or refuses_inference_tensors(tensors):
        return stock.chain_output(chain, x, residual, sample_factor, tensors, moves=True)
    if residual is x:  # one argument, whose gradient has two parts
        chain, residual = dataclasses.replace(chain, identity=True), None
    main = [own.weight for own in tensors[: len(chain.steps)]]
    in_channels_last = is_channels_last(x, main)
    given, x = x, worked_on(x, in_channels_last)
    counter = None  # stock saves what it was given, and notices writes to it
    if given is not x and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        counter = counter_of(given)
    if residual is not None:
        residual = worked_on(residual, in_channels_last)
    if sample_factor is not None:
        sample_factor = sample_factor.to(stat_dtype(x.dtype))
    return FusedChain.apply(chain, counter, x, residual, sample_factor, *flatten(tensors))
