"""A chain on values, for devices with 1x1 kernels that apply normalisation on load (``Chain.lazy``).

The program is that of :mod:`.chain`; what differs is what is written. A 3x3 convolution is ATen's and wants its input
and its gradient as tensors; around it everything is 1x1 and reads values. Bottleneck, of what passes over memory beyond
the convolutions' own reads and writes: forward the activation before the 3x3 and one read for its statistics, one read
for the Gram matrix, the residual; backward the gradient at the 3x3 and one read for the sums before it.
"""

from __future__ import annotations

import torch

from ..backends import run
from . import Chain, Lazy, LazyGrad, StepGrads, StepTensors, conv_norm, lazy_join, pointwise
from .conv import channels_last
from .pointwise import PathGrad

Tensor = torch.Tensor


def forward(chain: Chain, x: Tensor, residual: Tensor | None, sample_factor: Tensor | None, tensors: list[StepTensors]):
    """Output, inner values, state of the join, and the statistics of every batch norm in order."""
    value, inner, statistics = x, [], []
    for step, own in zip(chain.steps[:-1], tensors, strict=False):
        if pointwise.serves(step, own):
            z, bn, stats = pointwise.forward(value, own, step, chain.backend)
        else:
            h = pointwise.materialised(value, chain.backend)
            if chain.keep and inner:
                inner[-1] = inner[-1]._replace(written=h)
            z, bn, stats = conv_norm.forward(h, own, step, chain.backend)
        value = Lazy(z, bn)
        inner.append(value)
        statistics.append(stats)
    residual = x if chain.identity else residual
    out, state, join_statistics = lazy_join.forward(chain, value, x, tensors, residual, sample_factor)
    return out, inner, state, statistics + join_statistics


def backward(
    chain: Chain,
    grad_out: Tensor,
    x: Tensor,
    inner: list[Lazy],
    tensors: list[StepTensors],
    state: lazy_join.LazyJoinState,
    sample_factor: Tensor | None,
    needs: list[StepGrads],
    reach: list[bool],
    needs_residual: bool,
) -> tuple[Tensor | None, Tensor | None, list[StepGrads]]:
    """Gradients of x, of the residual, and of all parameters. `reach[i]`: whether step i's input needs a gradient."""
    n, backend = len(chain.steps), chain.backend
    value = inner[-1] if inner else x
    needs_other = needs_residual or (chain.from_input and reach[0])
    out = lazy_join.backward(
        chain, grad_out, value, x, tensors, state, sample_factor, needs, reach[n - 1], needs_other
    )  # fmt: skip
    grads, grad = [out.main], out.value
    other = out.other if chain.from_input and reach[0] else None
    for i in reversed(range(n - 1)):
        if not (reach[i] or any(needs[i])):
            grads.append(StepGrads())
            continue
        grad, step_grads = _step_backward(chain, i, grad, x, inner, tensors, needs[i], reach[i], other)
        grads.append(step_grads)
    grads.reverse()
    if chain.shortcut is not None:
        grads.append(out.shortcut)
    residual = None
    if needs_residual:
        residual = grad_out.clone()  # never hand out a gradient that autograd lent us
        if state.mask is not None:
            residual = run("norm_add_relu_backward", grad_out, mask=state.mask, backend=backend)[0]
    return grad if reach[0] else None, residual, grads


def _step_backward(
    chain: Chain,
    i: int,
    grad: LazyGrad,
    x: Tensor,
    inner: list[Lazy],
    tensors: list[StepTensors],
    needs: StepGrads,
    needs_input: bool,
    other: PathGrad | None,
) -> tuple[Tensor | LazyGrad | None, StepGrads]:
    """Backward of inner step `i`; `other` is added to the gradient of the chain's input."""
    step, own, backend = chain.steps[i], tensors[i], chain.backend
    value, previous = (inner[i - 1], chain.steps[i - 1]) if i else (x, None)
    if pointwise.serves(step, own):
        merged = other if i == 0 and step.conv.stride == (1, 1) else None
        grad_in, grads = pointwise.backward(
            grad, value, own, step, previous, backend, needs, needs_input, merged, chain.one_pass
        )
        if i == 0 and needs_input and merged is None:
            grad_in = pointwise.to_chain_input(grad_in, x, step, backend, other)
        return grad_in, grads
    dz = grad.materialise(backend)
    h = pointwise.materialised(value, backend)
    grad_in, grads = conv_norm.backward(dz, h, own, step, grad.coefficients, backend, needs, needs_input)
    if not needs_input:
        return None, grads
    if i == 0:
        return pointwise.add_path(channels_last(grad_in), other, backend), grads
    return conv_norm.mask_and_sum(channels_last(grad_in), value.z, value.bn, previous, backend), grads
