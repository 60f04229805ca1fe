"""The end of a chain whose last convolution is 1x1, on values: what `join` does, written only where it must be.

Two variants as there. *Gram*: the statistics of the last convolution follow from its input, so convolution, batch norm,
residual or projection and ReLU are one product that writes the output once (:mod:`.folded_join` has the mathematics).
Its gradient g = keep*grad_out is never written either: the sign bits of the output are, and readers mask on load.
*Plain*: z is written with its statistics, normalised and added in one more pass.

Small matrices of a Gram join: one launch forward (`gram_norm`), two backward (`gram_grad`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import run
from . import folded_join, pointwise
from .batch_norm import Affine, Coefficients, Statistics, coefficients
from .folded_join import Folded, FoldedGrads
from .join import raw
from .lazy import Lazy, LazyGrad
from .pointwise import PathGrad, Value, parts
from .spec import Chain, Step, StepGrads, StepTensors

Tensor = torch.Tensor

#: Outputs for each input from which one pass and a correction move less than two: 4C against 2K + K/8 bytes a pixel in
#: 16 bits. At 2 they would move 2% less (Wide ResNet's layer1), with one more kernel.
CORRECTION_PAYS = 3


class LazyJoinState(NamedTuple):
    """What the join's backward needs beside the chain's own saved tensors."""

    main: Affine | Folded
    z: Tensor | None  # raw output of the last convolution; None if a Gram join
    shortcut: Affine | Folded | None
    shortcut_z: Tensor | None  # raw output of the projection; None if a Gram join or absent
    mask: Tensor | None  # packed sign bits of the output; None without ReLU


class LazyJoinGrads(NamedTuple):
    """Gradients that leave the join."""

    value: Tensor | LazyGrad | None  # of what the last convolution read
    main: StepGrads
    shortcut: StepGrads | None
    other: PathGrad | None  # of the residual, or of the chain's input through the projection


def forward(
    chain: Chain,
    value: Value,
    x: Tensor,
    tensors: list[StepTensors],
    residual: Tensor | None,
    sample_factor: Tensor | None,
) -> tuple[Tensor, LazyJoinState, list[Statistics | None]]:
    """Output, state and statistics of the join."""
    step, own, statistics = chain.steps[-1], tensors[len(chain.steps) - 1], []
    main = z = shortcut = shortcut_z = None
    if chain.gram:
        main, stats = fold(value, own, step, parts(value)[0], chain.backend)
    else:
        z, main, stats = pointwise.forward(value, own, step, chain.backend)
    statistics.append(stats)
    if chain.shortcut is not None:
        if chain.gram_shortcut:
            shortcut, stats = fold(x, tensors[-1], chain.shortcut, parts(value)[0], chain.backend)
        else:
            shortcut_z, shortcut, stats = pointwise.forward(x, tensors[-1], chain.shortcut, chain.backend)
        statistics.append(stats)
    affine_residual = {}
    if shortcut_z is not None:
        residual = shortcut_z
        affine_residual = {"residual_scale": shortcut.scale, "residual_shift": shortcut.shift}
    options = {"residual": residual, "sample_factor": sample_factor, "relu": chain.relu, "emit_mask": chain.relu}
    options |= affine_residual
    if chain.gram:
        out, mask = _product(chain, value, x, own, tensors[-1], main, shortcut, options)
    else:
        out, mask = run("norm_add_relu", z, main.scale, main.shift, **options, backend=chain.backend)
    return out, LazyJoinState(main, z, shortcut, shortcut_z, mask if chain.relu else None), statistics


def _product(chain, value, x, own, projection, main, shortcut, options) -> tuple[Tensor, Tensor]:
    """The join as one matrix product, over ``[value | x]`` where the projection is a Gram join too."""
    raw, scale, shift = parts(value)
    if chain.gram_shortcut:
        bn = shortcut.bn
        options = options | {"x2": x, "stride2": chain.shortcut.conv.stride}
        options |= {"weight2": projection.weight.contiguous(), "scale2": bn.scale, "shift2": bn.shift}
    arguments = (raw, own.weight.contiguous(), main.bn.scale, main.bn.shift, scale, shift)
    return run("conv1x1_join", *arguments, **options, backend=chain.backend)


def fold(value: Value, own: StepTensors, step: Step, like: Tensor, backend: str) -> tuple[Folded, Statistics | None]:
    """Batch norm of ``conv(value)`` without the convolution. `like`: any tensor of as many pixels as its output."""
    raw, scale, shift = parts(value)
    centre = value.bn.centre if isinstance(value, Lazy) else None
    if centre is None and step.norm.batch_stats:
        centre = folded_join.sample_mean(value, backend, step.conv)
    return folded_join.fold(raw, own, step, centre, backend, scale, shift, step.conv.stride, like)


def backward(
    chain: Chain,
    grad_out: Tensor,
    value: Value,
    x: Tensor,
    tensors: list[StepTensors],
    state: LazyJoinState,
    sample_factor: Tensor | None,
    needs: list[StepGrads],
    needs_value: bool,
    needs_other: bool,
) -> LazyJoinGrads:
    """Gradients of everything that entered the join. `needs_other`: of the residual, or of x through the projection.

    Without inner steps `value` is the chain's input, and its gradient includes the other path's.
    """
    n, backend = len(chain.steps), chain.backend
    step, own = chain.steps[-1], tensors[n - 1]
    sums = None
    if not (chain.gram and (chain.shortcut is None or chain.gram_shortcut)):
        options = raw(state) | {"mask": state.mask, "sample_factor": sample_factor, "relu": chain.relu}
        sums = run("norm_add_relu_backward", grad_out, **options, emit_grad=False, backend=backend)
    shortcut_grads, other = None, None
    if chain.shortcut is not None:
        grad = _at_conv(chain, grad_out, state, chain.shortcut, state.shortcut, state.shortcut_z, sums and sums[3:])
        shortcut_grads, other = _shortcut_backward(chain, grad, x, tensors, state.shortcut, needs[-1], needs_other)
    elif needs_other:
        other = PathGrad(grad_out, state.mask)
    grad = _at_conv(chain, grad_out, state, step, state.main, state.z, sums and sums[1:3], sample_factor)
    previous = chain.steps[-2] if n > 1 else None
    merged = other if n == 1 and chain.from_input and step.conv.stride == (1, 1) else None
    grad_value, main_grads = _branch_backward(
        chain, grad, value, own, step, previous, state.main, needs[n - 1], needs_value, merged
    )
    if n == 1 and grad_value is not None and merged is None:
        into = other if chain.from_input else None
        grad_value = pointwise.to_chain_input(grad_value, x, step, backend, into)
    return LazyJoinGrads(grad_value, main_grads, shortcut_grads, other)


def _shortcut_backward(chain, grad, x, tensors, bn, needs, needs_x) -> tuple[StepGrads, PathGrad | None]:
    """Gradients of the projection's parameters, and of x through it.

    Where the chain's first convolution reads x again, it adds the correction of a Gram join on the way.
    """
    step, own, first = chain.shortcut, tensors[-1], chain.steps[0]
    if _one_pass(chain, step, own, bn, x, needs, needs_x):
        both, grads, correction = _gram_in_one_pass(chain, grad, x, own, step, None, bn, needs)
        grad_x = both.value
        if correction is not None:
            if len(chain.steps) > 1 and first.conv.stride == (1, 1) and pointwise.serves(first, tensors[0]):
                return grads, PathGrad(grad_x.g, None, step.conv.stride, correction)
            grad_x = pointwise.input_grad(grad_x, x, step, None, None, chain.backend, None, correction)
    else:
        grad_x, grads = _branch_backward(chain, grad, x, own, step, None, bn, needs, needs_x)
    return grads, None if grad_x is None else PathGrad(grad_x, None, step.conv.stride)


def _branch_backward(chain, grad, value, own, step, previous, bn, needs, needs_value, other=None):
    """Gradients of what a branch's convolution read (of the pixels that it read) and of its parameters."""
    backend = chain.backend
    if not isinstance(bn, Folded):
        more = (other, chain.one_pass)
        return pointwise.backward(grad, value, own, step, previous, backend, needs, needs_value, *more)
    weight = own.weight
    if _one_pass(chain, step, own, bn, value, needs, needs_value):
        both, grads, correction = _gram_in_one_pass(chain, grad, value, own, step, previous, bn, needs, other)
        if correction is None:
            return both.value, grads
        grad, weight = both.value, None
    else:
        grads, correction = _gram_parameters(grad, value, own, step, bn, needs, needs_value, backend)
        if not needs_value:
            return None, grads
    return pointwise.input_grad(grad, value, step, previous, weight, backend, other, correction), grads


def _one_pass(chain, step, own, bn, value, needs, needs_value) -> bool:
    """Whether both gradients of a Gram join's branch should come from one pass over its gradient.

    The input's is then corrected in a pass of its own, once the weight's is known: two reads of C channels, where a
    second read of the K channels of g is saved. A tensor that the chain's first convolution reads again is corrected
    there.
    """
    if not (chain.one_pass and needs_value and isinstance(bn, Folded) and pointwise.narrow(step, own.weight)):
        return False
    outputs, inputs = own.weight.shape[:2]
    if step.norm.batch_stats:
        return not isinstance(value, Lazy) or outputs >= CORRECTION_PAYS * inputs
    return any(needs)


def _gram_in_one_pass(chain, grad, value, own, step, previous, folded, needs, other=None):
    """The one pass, gradients of the parameters, and the correction that the input's gradient still lacks, or None."""
    complete, scale = not step.norm.batch_stats, folded.bn.scale
    plain = grad._replace(coefficients=grad.coefficients._replace(a=None))
    both = pointwise.both_grads(
        plain, value, previous, own.weight, chain.backend, other if complete else None, scale, complete
    )
    found = folded_join.parameter_grads(both.weight, both.sum_dz, grad.g, own, step, folded, chain.backend)
    return both, _wanted(found, both.sum_dz, needs), None if complete else (found.coupling, found.constant)


def _at_conv(chain, grad_out, state, step, bn, z, sums, sample_factor=None) -> LazyGrad:
    """The gradient at a branch's convolution as a value; of a Gram join ``scale * g``, the rest is its correction."""
    if isinstance(bn, Folded):
        c = Coefficients(bn.bn.scale, None, None, None, None)
        return LazyGrad(grad_out, None, c, bn.bn, mask=state.mask)
    c = coefficients(bn, *sums, grad_out, step.norm, chain.backend)
    return LazyGrad(grad_out, z, c, bn, sample_factor=sample_factor, mask=state.mask)


def _gram_parameters(
    grad, value, own, step, folded, needs, needs_value, backend
) -> tuple[StepGrads, tuple[Tensor, Tensor] | None]:
    """Gradients of a Gram join's parameters, and the correction of its input's gradient; see :mod:`.folded_join`."""
    if not (any(needs) or (needs_value and step.norm.batch_stats)):
        return StepGrads(), None
    x, x_scale, x_shift = parts(value)
    options = {"mask": grad.mask, "x_scale": x_scale, "x_shift": x_shift, "stride": step.conv.stride}
    product, sum_g = run("conv1x1_wgrad", grad.g, x, **options, backend=backend)
    found = folded_join.parameter_grads(product, sum_g, grad.g, own, step, folded, backend)
    return _wanted(found, sum_g, needs), None if found.coupling is None else (found.coupling, found.constant)


def _wanted(found: FoldedGrads, sum_g: Tensor, needs: StepGrads) -> StepGrads:
    values = StepGrads(found.weight, None, found.gamma, sum_g)
    return StepGrads(*(value if need else None for value, need in zip(values, needs, strict=True)))
