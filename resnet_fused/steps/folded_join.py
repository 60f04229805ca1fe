"""The join that never writes its convolution's output: conv + bn + residual + ReLU as one convolution.

The scale and shift of batch norm are known *before* the convolution runs, so they go into its weight and its epilogue.
With running statistics that is plain folding. With batch statistics they follow from the Gram matrix of the
convolution's input (1x1 convolutions only): for ``z = W a`` over M pixels, ``d = a - centre``::

    m = sum(d)/M;  Cov = d'd/M - m m';   mean = W (m + centre);   var_k = w_k' Cov w_k

Backward, with g the masked gradient: ``grad_beta = sum g``, ``grad_a = g (scale*W) + a S + constant``; `gram_grad` says
how S, the constant and the gradients of W and gamma follow from ``g' a`` and ``sum g``, everything in the shifted
input d, so that a large mean cancels nowhere. With running statistics S and the constant are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import run
from .batch_norm import Affine, Statistics, batch_affine, running_affine
from .conv import input_grad, strided, transposed, weight_grad
from .lazy import Lazy
from .spec import Conv, Step, StepGrads, StepTensors

Tensor = torch.Tensor
POINTWISE = Conv()
CENTRE_IMAGES = 4


class Gram(NamedTuple):
    """Sufficient statistics of the input `a` of a 1x1 convolution, shifted by `centre`."""

    gram: Tensor  # [C, C]
    total: Tensor  # [C]
    centre: Tensor  # [C]


class Folded(NamedTuple):
    """A branch of a join whose output is never written."""

    bn: Affine
    gram: Gram | None  # None: running statistics


def sample_mean(value: Tensor | Lazy, backend: str, conv: Conv = POINTWISE) -> Tensor:
    """Mean of the first few images: to shift by, it need not be that of all, which would cost a pass.

    Of the pixels that `conv` reads, since the others may hold anything.
    """
    a = value.z if isinstance(value, Lazy) else value
    a = strided(a[:CENTRE_IMAGES], conv)
    if isinstance(value, Lazy):
        a = Lazy(a, value.bn).materialise(backend)
    return run("bn_stats", a, backend=backend)[0]


def fold(
    a: Tensor,
    tensors: StepTensors,
    step: Step,
    centre: Tensor | None,
    backend: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    like: Tensor | None = None,
) -> tuple[Folded, Statistics | None]:
    """Batch norm of ``conv(a)`` without the convolution, or of ``conv(relu(scale*a + shift))`` where these are given.

    `centre` None: running statistics. `a` holds the pixels that the convolution reads, or all, to be read at `stride`;
    `like` is then any tensor of as many pixels as the output.
    """
    if not step.norm.batch_stats:
        return Folded(running_affine(tensors, step.norm, a.dtype, backend), None), None
    gram, total = run("gram", a, centre, scale, shift, stride, backend=backend)
    like = a if like is None else like
    mean, m2 = run("gram_norm", tensors.weight.contiguous(), gram, total, centre, like, backend=backend)
    bn, statistics = batch_affine(mean, m2, tensors, step.norm, like, backend)
    return Folded(bn, Gram(gram, total, centre)), statistics


def shift_of(folded: Folded, tensors: StepTensors) -> Tensor:
    """What the join adds to the folded convolution: batch norm's shift, and the convolution's own bias scaled."""
    if tensors.bias is None:
        return folded.bn.shift
    return torch.addcmul(folded.bn.shift, folded.bn.scale, tensors.bias.to(folded.bn.scale.dtype))


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` with batch norm's scale in it, rounded once to the weight's dtype."""
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)


class FoldedGrads(NamedTuple):
    """Of a branch whose output was never written, from ``product = g' a`` and ``sum g``."""

    weight: Tensor  # [K, C/groups, R, S]
    gamma: Tensor  # [K]
    coupling: Tensor | None  # [C, C, 1, 1], S of the formulas; None: running statistics
    constant: Tensor | None  # [C]


def parameter_grads(
    product: Tensor, sum_g: Tensor, g: Tensor, tensors: StepTensors, step: Step, folded: Folded, backend: str
) -> FoldedGrads:
    """Gradients of the branch's weight and gamma, and what corrects its input's. `product` is not shifted.

    `g`: any tensor of as many pixels as the output.
    """
    bn, gram = folded
    product = product.flatten(1).to(bn.scale.dtype)
    if step.norm.batch_stats:
        arguments = (tensors.weight.contiguous(), product, *gram, sum_g, bn.scale, bn.rstd)
        weight, gamma, coupling, constant = run("gram_grad", *arguments, g, backend=backend)
        return FoldedGrads(weight.view(tensors.weight.shape), gamma, coupling, constant)
    offset = bn.mean if tensors.bias is None else bn.mean - tensors.bias.to(bn.scale.dtype)
    wide = torch.float64 if product.device.type == "cpu" else product.dtype  # as in gram_grad: digits cancel
    own = (tensors.weight.flatten(1).to(product.dtype) * product).sum(1, dtype=wide)
    centred = torch.addcmul(own, offset.to(wide), sum_g.to(wide), value=-1).to(product.dtype)
    weight = (bn.scale.unsqueeze(1) * product).view(tensors.weight.shape)
    return FoldedGrads(weight, bn.rstd * centred, None, None)


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
    scale, coupled, found = folded.bn.scale, step.norm.batch_stats, None
    if coupled or needs.weight or needs.gamma:
        product = weight_grad(g, a, tensors.weight, conv, backend)
        found = parameter_grads(product, sum_g, g, tensors, step, folded, backend)
    bias = torch.zeros_like(sum_g) if coupled else scale * sum_g
    values = (None if found is None else found.weight, bias, None if found is None else found.gamma, sum_g)
    grads = StepGrads(*(value if need else None for value, need in zip(values, needs, strict=True)))
    if not needs_a:
        return None, grads
    folded_weight = scaled(tensors.weight, scale)
    if not coupled:
        return input_grad(g, a, folded_weight, conv, backend, add_to), grads
    if add_to is None:
        grad_a = run("conv_add_relu", a, found.coupling, found.constant, backend=backend)
    else:
        run("conv_add_relu_", add_to, a, found.coupling, found.constant, backend=backend)
        grad_a = add_to
    run("conv_add_relu_", grad_a, g, transposed(folded_weight), backend=backend)
    return grad_a, grads
