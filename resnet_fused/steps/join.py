"""The end of a chain: last convolution, its batch norm, the residual, and the ReLU.

Two variants. *Plain* writes the raw output z of the last convolution, takes its statistics and normalises, adds and
clamps in one more pass; z is saved. *Folded* never writes z (see `folded_join`). A projection shortcut is a branch of
the same two kinds. Which is used where is the plan's choice, in :class:`spec.Chain`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import run
from . import conv_norm, folded_join
from .batch_norm import Affine, Statistics, coefficients
from .conv import strided
from .folded_join import POINTWISE, Folded
from .lazy import LazyGrad
from .spec import Chain, Step, StepGrads, StepTensors

Tensor = torch.Tensor


class JoinState(NamedTuple):
    """What the join's backward needs beside the chain's own saved tensors."""

    main: Affine | Folded
    z: Tensor | None  # raw output of the last convolution; None if folded
    shortcut: Affine | Folded | None
    shortcut_z: Tensor | None  # raw output of the projection; None if folded or absent
    index: Tensor | None = None  # of each window's winner, of a pooled output


class JoinGrads(NamedTuple):
    """Gradients that leave the join."""

    h: Tensor | None  # of the last convolution's input
    main: StepGrads
    shortcut: StepGrads | None
    # Of the residual tensor, or of the chain's input through the projection (of the pixels that it reads, where that is
    # strided); ours to add to.
    residual: Tensor | None


def forward(
    chain: Chain,
    h: Tensor,
    x: Tensor,
    tensors: list[StepTensors],
    residual: Tensor | None,
    sample_factor: Tensor | None,
    previous: Affine | None,
) -> tuple[Tensor, JoinState, list[Statistics | None]]:
    """Output, state and statistics of the join.

    `h`: input of the last convolution. `x`: the chain's input. `previous`: the batch norm that `h` came out of.
    Returned statistics: of the last batch norm and, with a projection, of its batch norm.
    """
    last, backend = chain.steps[-1], chain.backend
    main, statistics = tensors[len(chain.steps) - 1], []
    if chain.gram:
        centre = _centre(h, previous, last.norm.batch_stats, backend)
        state, stats = folded_join.fold(h, main, last, centre, backend)
        z = None
    else:
        z, state, stats = conv_norm.forward(h, main, last, backend)
    statistics.append(stats)

    shortcut = shortcut_z = None
    if chain.shortcut is not None:
        shortcut, shortcut_z, stats = _shortcut_forward(chain, x, tensors[-1])
        statistics.append(stats)
    if chain.pool is not None:
        out, index = run("norm_relu_pool", z, state.scale, state.shift, *chain.pool.args, backend=backend)
        return out, JoinState(state, z, None, None, index), statistics
    if chain.gram:
        out = _folded_output(chain, h, x, tensors, residual, state, shortcut, shortcut_z)
    else:
        out = _plain_output(chain, z, x, tensors, residual, sample_factor, state, shortcut, shortcut_z)
    return out, JoinState(state, z, shortcut, shortcut_z), statistics


def _centre(a: Tensor, previous: Affine | None, needed: bool, backend: str) -> Tensor | None:
    if not needed:
        return None
    return folded_join.sample_mean(a, backend) if previous is None or previous.centre is None else previous.centre


def _shortcut_forward(
    chain: Chain, x: Tensor, tensors: StepTensors
) -> tuple[Affine | Folded, Tensor | None, Statistics | None]:
    step, backend = chain.shortcut, chain.backend
    if not chain.gram_shortcut:
        z, bn, stats = conv_norm.forward(x, tensors, step, backend)
        return bn, z, stats
    a = strided(x, step.conv) if step.norm.batch_stats else x
    folded, stats = folded_join.fold(a, tensors, step, _centre(a, None, step.norm.batch_stats, backend), backend)
    return folded, None, stats


def _shortcut_output(chain: Chain, x: Tensor, tensors: StepTensors, folded: Folded) -> Tensor:
    weight = folded_join.scaled(tensors.weight, folded.bn.scale)
    shift = folded_join.shift_of(folded, tensors)
    return run("conv_add_relu", x, weight, shift, None, *chain.shortcut.conv.args, backend=chain.backend)


def _folded_output(chain, h, x, tensors, residual, state, shortcut, shortcut_z) -> Tensor:
    """The join as one convolution; the projection's branch, if any, is written first and added to in place."""
    conv, main, backend = chain.steps[-1].conv, tensors[len(chain.steps) - 1], chain.backend
    weight, shift = folded_join.scaled(main.weight, state.bn.scale), folded_join.shift_of(state, main)
    if chain.shortcut is None:
        return run("conv_add_relu", h, weight, shift, residual, *conv.args, chain.relu, backend=backend)
    if chain.gram_shortcut:
        out = _shortcut_output(chain, x, tensors[-1], shortcut)
    else:
        out, _ = run("norm_add_relu", shortcut_z, shortcut.scale, shortcut.shift, relu=False, backend=backend)
    run("conv_add_relu_", out, h, weight, shift, *conv.args, chain.relu, backend=backend)
    return out


def _plain_output(chain, z, x, tensors, residual, sample_factor, state, shortcut, shortcut_z) -> Tensor:
    scale = shift = None
    if chain.shortcut is not None:
        if chain.gram_shortcut:
            residual = _shortcut_output(chain, x, tensors[-1], shortcut)
        else:
            residual, scale, shift = shortcut_z, shortcut.scale, shortcut.shift
    return run(
        "norm_add_relu", z, state.scale, state.shift, residual, scale, shift, sample_factor, chain.relu,
        backend=chain.backend,
    )[0]  # fmt: skip


def backward(
    chain: Chain,
    grad_out: Tensor,
    out: Tensor | None,
    h: Tensor,
    x: Tensor,
    tensors: list[StepTensors],
    state: JoinState,
    has_residual: bool,
    sample_factor: Tensor | None,
    needs: list[StepGrads],
    needs_h: bool,
    needs_residual: bool,
) -> JoinGrads:
    """Gradients of everything that entered the join. `out` is its output if there was a residual, else None."""
    if chain.pool is not None:
        return _pooled_backward(chain, grad_out, h, tensors, state, needs, needs_h)
    backend, n = chain.backend, len(chain.steps)
    step, main = chain.steps[-1], tensors[n - 1]
    bn = state.main.bn if chain.gram else state.main
    recompute = chain.relu and not has_residual and not chain.gram
    options = raw(state) | ({"scale": bn.scale, "shift": bn.shift} if recompute else {"mask": out})
    options |= {"sample_factor": sample_factor, "relu": chain.relu, "emit_grad": chain.relu}
    g, sum_g, sum_gz, shortcut_sum_g, shortcut_sum_gz = run(
        "norm_add_relu_backward", grad_out, **options, backend=backend
    )
    g = g if chain.relu else grad_out
    if chain.gram:
        grad_h, main_grads = folded_join.backward(
            g, sum_g, h, main, step, state.main, backend, needs[n - 1], needs_h, step.conv, owned=n > 1
        )
    else:
        c = coefficients(bn, sum_g, sum_gz, g, step.norm, backend)
        dz = LazyGrad(g, state.z, c, bn, sample_factor=sample_factor).materialise(backend)
        grad_h, main_grads = conv_norm.backward(dz, h, main, step, c, backend, needs[n - 1], needs_h)
    if chain.shortcut is None:
        own = g if chain.relu else g.clone()  # never add to a gradient that autograd lent us
        return JoinGrads(grad_h, main_grads, None, own if needs_residual else None)
    if chain.gram_shortcut and not shortcut_sum_g.numel():
        shortcut_sum_g = sum_g if sample_factor is None else g.sum((0, 2, 3), dtype=sum_g.dtype)
    grad_x, shortcut_grads = _shortcut_backward(
        chain, g, shortcut_sum_g, shortcut_sum_gz, x, tensors[-1], state, needs[-1], needs_residual
    )
    return JoinGrads(grad_h, main_grads, shortcut_grads, grad_x)


def raw(state) -> dict[str, Tensor]:
    """What a join (also that of `lazy_join`) wrote raw and the means to sum it about, for `norm_add_relu_backward`."""
    found = {} if state.z is None else {"z": state.z, "mean": state.main.mean}
    if state.shortcut_z is not None:
        found |= {"residual": state.shortcut_z, "residual_mean": state.shortcut.mean}
    return found


def _pooled_backward(chain, grad_out, h, tensors, state, needs, needs_h) -> JoinGrads:
    """Of a stem: the gradient reaches its convolution from the pool's output, through nothing of the size between."""
    step, own, bn, backend = chain.steps[-1], tensors[-1], state.main, chain.backend
    read = (grad_out, state.index, state.z)
    sums = run("norm_relu_pool_backward", *read, bn.mean, bn.scale, bn.shift, *chain.pool.args, backend=backend)
    c = coefficients(bn, *sums, state.z, step.norm, backend)
    vectors = (c.a, c.b, c.d, bn.scale, bn.shift)
    dz = run("norm_relu_pool_apply", *read, *vectors, *chain.pool.args, backend=backend)
    grad_h, grads = conv_norm.backward(dz, h, own, step, c, backend, needs[-1], needs_h)
    return JoinGrads(grad_h, grads, None, None)


def _shortcut_backward(chain, g, sum_g, sum_gz, x, tensors, state, needs, needs_x) -> tuple[Tensor | None, StepGrads]:
    step, backend = chain.shortcut, chain.backend
    sparse = is_sparse(chain, tensors.weight)
    conv, read = (POINTWISE, strided(x, step.conv)) if sparse else (step.conv, x)
    if chain.gram_shortcut:
        return folded_join.backward(g, sum_g, read, tensors, step, state.shortcut, backend, needs, needs_x, conv)
    c = coefficients(state.shortcut, sum_g, sum_gz, g, step.norm, backend)
    dz = LazyGrad(g, state.shortcut_z, c, state.shortcut).materialise(backend)
    return conv_norm.backward(dz, read, tensors, Step(conv, step.norm), c, backend, needs, needs_x)


def is_sparse(chain: Chain, weight: Tensor) -> bool:
    """Whether the projection reads only some pixels of its input: its gradient is then returned for those alone."""
    return chain.shortcut.conv.is_pointwise(weight) and chain.shortcut.conv.stride != (1, 1)


def add_residual_grad(grad_x: Tensor, grad: Tensor, chain: Chain) -> Tensor:
    """Add the residual's gradient to the main branch's, in place; at the pixels that it is for."""
    if grad.shape == grad_x.shape:
        return grad_x.add_(grad)
    rows, columns = chain.shortcut.conv.stride
    grad_x[:, :, ::rows, ::columns].add_(grad)
    return grad_x
