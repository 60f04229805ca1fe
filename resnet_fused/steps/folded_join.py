"""The join that never writes its convolution's output: conv + bn + residual + ReLU as one convolution.

The scale and shift of batch norm are known *before* the convolution runs, so they go into its weight and its epilogue.
With running statistics that is plain folding. With batch statistics they follow from the Gram matrix of the
convolution's input (1x1 convolutions only): for ``z = W a`` over M pixels, ``d = a - centre``::

    m = sum(d)/M;  Cov = d'd/M - m m';   mean = W (m + centre);   var_k = w_k' Cov w_k

Backward, with g the masked gradient: ``grad_beta = sum g``, ``grad_a = g (scale*W) + a S + constant``; `gram_grad` says
how S, the constant and the gradients of W and gamma follow from ``g' a`` and ``sum g``. But in 16 bits, all of it is
done with d itself in the place of a, so that a large mean cancels nowhere. With running statistics S and the constant
are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import run
from .batch_norm import Affine, Statistics, affine_of, parameters, running_affine
from .conv import input_grad, strided, weight_grad
from .lazy import Lazy
from .spec import Conv, Step, StepGrads, StepTensors

Tensor = torch.Tensor
POINTWISE = Conv()
CENTRE_IMAGES = 4
FEW_CHANNELS = 16  # below, oneDNN's weight gradients of 8192 pixels were up to 7 times less exact than those of ours


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
    arguments = (tensors.weight.contiguous(), gram, total, centre, like)
    found = run("gram_norm", *arguments, **parameters(tensors, step.norm), backend=backend)
    bn, statistics = affine_of(found, like)
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
    product: Tensor,
    sum_g: Tensor,
    g: Tensor,
    tensors: StepTensors,
    step: Step,
    folded: Folded,
    backend: str,
    wide: bool = False,
) -> FoldedGrads:
    """Gradients of the branch's weight and gamma, and what corrects its input's. `product` is not shifted.

    `g`: any tensor of as many pixels as the output. `wide`: in float64, results too, but for the coupling: an error
    there is the same at every pixel, and what lies before the branch sums over pixels.
    """
    bn, gram = folded
    weight = tensors.weight.contiguous()
    if wide:
        bn, gram = bn._replace(rstd=bn.rstd.double(), scale=bn.scale.double()), Gram(*(t.double() for t in gram))
        weight, sum_g = weight.double(), sum_g.double()
    product = product.flatten(1).to(bn.scale.dtype)
    if step.norm.batch_stats:
        arguments = (weight, product, *gram, sum_g, bn.scale, bn.rstd)
        weight, gamma, coupling, constant = run("gram_grad", *arguments, g, backend=backend)
        coupling = coupling.to(tensors.weight.dtype)
        return FoldedGrads(weight.view(tensors.weight.shape), gamma, coupling, constant)
    offset = bn.mean if tensors.bias is None else bn.mean - tensors.bias.to(bn.scale.dtype)
    sums = torch.float64 if product.device.type == "cpu" else product.dtype  # as in gram_grad: digits cancel
    own = (tensors.weight.flatten(1).to(product.dtype) * product).sum(1, dtype=sums)
    centred = torch.addcmul(own, offset.to(sums), sum_g.to(sums), value=-1).to(product.dtype)
    weight = (bn.scale.unsqueeze(1) * product).view(tensors.weight.shape)
    return FoldedGrads(weight, bn.rstd * centred, None, None)


def _centres(a: Tensor) -> bool:
    """Whether the gradients are taken of the centred input: not in 16 bits, where it would be rounded once more."""
    return a.element_size() > 2


def _centred(a: Tensor, folded: Folded, conv: Conv, owned: bool) -> tuple[Tensor, Folded]:
    """The pixels that `conv` reads less the centre, and the branch as one that reads those: its own centre is 0.

    Otherwise ``g' a - sum_g centre'`` and ``a S - centre S`` would cancel as many digits as the mean has more than the
    deviation, after products have been rounded to float32.
    """
    gram, total, centre = folded.gram
    own, along = strided(a, conv), centre.to(a.dtype).view(1, -1, 1, 1)
    d = own.sub_(along) if owned or own is not a else own - along
    return d, folded._replace(gram=Gram(gram, total, torch.zeros_like(centre)))


def _product(g: Tensor, a: Tensor, weight: Tensor, conv: Conv, backend: str) -> Tensor:
    """``g' a``. Of few channels oneDNN sums all pixels one after the other; there in short sums."""
    if weight.shape[1] < FEW_CHANNELS and a.dtype == torch.float32 and conv == POINTWISE:
        return run("conv_weight_grad", g, a, weight, *conv.args[:3], backend=backend)
    return weight_grad(g, a, weight, conv, backend)


def _balance(g: Tensor, sum_g: Tensor, folded_weight: Tensor, gram: Gram, coupling: Tensor) -> Tensor:
    """The constant for which the input's gradient sums to 0 over the pixels, as behind any batch norm it does.

    Of the two matrices as they were rounded: their rounding is the same at every pixel, and what lies before the branch
    sums over pixels.
    """
    pixels = g.shape[0] * g.shape[2] * g.shape[3]
    sums = sum_g.double() @ folded_weight.flatten(1).double() + gram.total.double() @ coupling.flatten(1).double()
    return (sums / -max(pixels, 1)).to(gram.total.dtype)


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
    owned: bool = False,
) -> tuple[Tensor | None, StepGrads]:
    """Gradients of the branch's input and parameters from the masked gradient `g` and its sum.

    `conv`: the geometry from `a` to the output (`a` may be strided already). `owned`: `a` may be overwritten.
    """
    scale, coupled, found = folded.bn.scale, step.norm.batch_stats, None
    if coupled and _centres(a):
        a, folded = _centred(a, folded, conv, owned)
        conv = POINTWISE
    if coupled or needs.weight or needs.gamma:
        product = _product(g, a, tensors.weight, conv, backend)
        found = parameter_grads(product, sum_g, g, tensors, step, folded, backend, wide=coupled and _centres(a))
    bias = torch.zeros_like(sum_g) if coupled else scale * sum_g
    values = (None if found is None else found.weight, bias, None if found is None else found.gamma, sum_g)
    grads = StepGrads(*(value if need else None for value, need in zip(values, needs, strict=True)))
    if not needs_a:
        return None, grads
    folded_weight = scaled(tensors.weight, scale)
    grad_a = input_grad(g, a, folded_weight, conv, backend)
    if coupled:
        centred = _centres(a)
        constant = _balance(g, sum_g, folded_weight, folded.gram, found.coupling) if centred else found.constant
        run("conv_add_relu_", grad_a, a, found.coupling, constant, backend=backend)
    return grad_a, grads
