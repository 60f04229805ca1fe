"""The join that never writes its convolution's output: conv + bn + residual + ReLU as one convolution.

The scale and shift of batch norm are known *before* the convolution runs, so they go into its weight and its epilogue.
With running statistics that is plain folding. With batch statistics they follow from the Gram matrix of the
convolution's input (1x1 convolutions only): for ``z = W a`` over M pixels, ``d = a - centre``::

    m = sum(d)/M;  Cov = d'd/M - m m';   mean = W (m + centre);   var_k = w_k' Cov w_k

Backward, with g the masked gradient, ``P = g'd`` and ``Wm = W m``::

    grad_beta  = sum g
    grad_gamma = rstd * (rowsum(W * P) - Wm * sum g)
    b = -scale*rstd*grad_gamma/M;   d0 = scale*(rstd*grad_gamma*Wm - grad_beta)/M
    grad_W = scale*P + b*(W d'd) + d0 sum(d)'
    grad_a = g (scale*W) + d S + d0 W,     S = W' diag(b) W

Everything is written in the shifted input d, so that a large mean cancels nowhere. With running statistics b = d0 = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import run
from .batch_norm import Affine, Statistics, batch_affine, pixels, running_affine
from .conv import input_grad, transposed, weight_grad
from .lazy import Lazy
from .spec import Conv, Step, StepGrads, StepTensors

Tensor = torch.Tensor
POINTWISE = Conv()
CENTRE_IMAGES = 4


class Gram(NamedTuple):
    """Sufficient statistics of the input `a` of a 1x1 convolution, shifted by `centre`."""

    centre: Tensor  # [C]
    gram: Tensor  # [C, C]
    total: Tensor  # [C]


class Folded(NamedTuple):
    """A branch of a join whose output is never written."""

    bn: Affine
    gram: Gram | None  # None: running statistics


def sample_mean(value: Tensor | Lazy, backend: str) -> Tensor:
    """Mean of the first few images: to shift by, it need not be that of all, which would cost a pass."""
    a = value.z if isinstance(value, Lazy) else value
    a = a[:CENTRE_IMAGES]
    if isinstance(value, Lazy):
        a = Lazy(a, value.bn).materialise(backend)
    return run("bn_stats", a, backend=backend)[0]


def fold(
    a: Tensor, tensors: StepTensors, step: Step, centre: Tensor | None, backend: str
) -> tuple[Folded, Statistics | None]:
    """Batch norm of ``conv(a)`` without the convolution. `a` is already strided; `centre` None: running statistics."""
    if not step.norm.batch_stats:
        return Folded(running_affine(tensors, step.norm, a.dtype), None), None
    gram, total = run("gram", a, centre, backend=backend)
    mean, m2 = run("gram_norm", tensors.weight, gram, total, centre, a, backend=backend)
    bn, statistics = batch_affine(mean, m2, tensors, step.norm, a, backend)
    return Folded(bn, Gram(centre, gram, total)), statistics


def shift_of(folded: Folded, tensors: StepTensors) -> Tensor:
    """What the join adds to the folded convolution: batch norm's shift, and the convolution's own bias scaled."""
    if tensors.bias is None:
        return folded.bn.shift
    return torch.addcmul(folded.bn.shift, folded.bn.scale, tensors.bias.to(folded.bn.scale.dtype))


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` with batch norm's scale in it, rounded once to the weight's dtype."""
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def backward(
    g: Tensor,
    sum_g: Tensor,
    a: Tensor,
    tensors: StepTensors,
    step: Step,
    folded: Folded,
    backend: str,
    needs: StepGrads,
    needs_a: bool,
    conv: Conv,
    add_to: Tensor | None = None,
) -> tuple[Tensor | None, StepGrads]:
    """Gradients of the branch's input and parameters from the masked gradient `g` and its sum.

    `conv`: the geometry from `a` to the output (`a` may be strided already). `add_to`: see :func:`conv.input_grad`.
    """
    bn, gram = folded
    scale, count = bn.scale, pixels(g)
    coupled = step.norm.batch_stats
    grad_gamma = product = None
    if coupled or needs.weight or needs.gamma:
        product = weight_grad(g, a, tensors.weight, conv, backend).to(scale.dtype)
        weight = tensors.weight.to(scale.dtype)
        offset = bn.mean if tensors.bias is None else bn.mean - tensors.bias.to(scale.dtype)
        if coupled:
            product = product - torch.outer(sum_g, gram.centre).view_as(product)
            offset = weight.flatten(1) @ (gram.total / count)
        grad_gamma = bn.rstd * torch.addcmul((weight * product).flatten(1).sum(1), offset, sum_g, value=-1)
    grad_weight = scale.view(-1, 1, 1, 1) * product if needs.weight else None
    folded_weight = scaled(tensors.weight, scale)
    if not coupled:
        grad_a = input_grad(g, a, folded_weight, conv, backend, add_to) if needs_a else None
        return grad_a, _grads(needs, grad_weight, scale * sum_g, grad_gamma, sum_g)

    unit = scale / count
    b = -unit * bn.rstd * grad_gamma
    d0 = unit * torch.addcmul(-sum_g, bn.rstd * grad_gamma, offset)
    flat = weight.flatten(1)
    if needs.weight:
        correction = torch.addr(b.unsqueeze(1) * (flat @ gram.gram), d0, gram.total)
        grad_weight = grad_weight + correction.view_as(grad_weight)
    grad_a = None
    if needs_a:
        coupling = flat.T @ (b.unsqueeze(1) * flat)  # S, symmetric
        constant = d0 @ flat - gram.centre @ coupling
        square = coupling.to(a.dtype).view(*coupling.shape, 1, 1)
        if add_to is None:
            grad_a = run("conv_add_relu", a, square, constant, backend=backend)
        else:
            run("conv_add_relu_", add_to, a, square, constant, backend=backend)
            grad_a = add_to
        run("conv_add_relu_", grad_a, g, transposed(folded_weight), backend=backend)
    return grad_a, _grads(needs, grad_weight, torch.zeros_like(sum_g), grad_gamma, sum_g)


def _grads(needs: StepGrads, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> StepGrads:
    values = StepGrads(weight, bias, gamma, beta)
    return StepGrads(*(value if need else None for value, need in zip(values, needs, strict=True)))
