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
from torch import Tensor

from ..backends import run
from . import own_product
from .batch_norm import Affine, affine_of, parameters, pixels, running_affine
from .conv import POINTWISE, gradients, strided
from .flow import Backward, Forward
from .lazy import EVERY, Folded, Gram, Lazy, Pending, Pixels, Value
from .pointwise import parts
from .spec import StepGrads

CENTRE_IMAGES = 4
FEW_CHANNELS = 16  # below, oneDNN's weight gradients of 8192 pixels were up to 7 times less exact than those of ours


class FoldedGrads(NamedTuple):
    """Of a branch whose output was never written, from ``product = g' a`` and ``sum g``."""

    weight: Tensor  # [K, C/groups, R, S]
    gamma: Tensor | None  # [K]; None where nobody wants it
    #: S of the formulas, [C, C, 1, 1], and the constant, [C]; None: running statistics.
    correction: tuple[Tensor, Tensor] | None


class Branch:
    """A convolution and the batch norm behind it, never written, in one direction of a call; `norm` makes its value."""

    def __init__(self, flow: Forward | Backward, norm: int) -> None:
        node = flow.program.maker(norm)
        conv = flow.program.maker(node.source)
        self.flow, self.backend, self.norm, self.conv = flow, flow.backend, norm, node.source
        self.source, self.settings, self.geometry = conv.source, node.norm, conv.conv
        own = flow.tensors[self.conv]
        self.own = flow.tensors[norm]._replace(weight=own.weight, bias=own.bias)

    def fold(self, read: Value, stride: Pixels = EVERY, like: Tensor | None = None) -> Folded:
        """Batch norm of the convolution without the convolution; forward, after which it is known.

        `read`: what the convolution reads, of all pixels, to be read at `stride`, or of those that it reads. `like`:
        any tensor of as many pixels as its output; None: `read` is.
        """
        f, value, (a, *applied) = self.flow, self.flow.values[self.source], parts(read)
        if self.norm in f.folded:  # where the output is made again
            return self.folded
        if not self.settings.batch_stats:
            f.folded[self.norm] = Folded(running_affine(self.own, self.settings, a.dtype, self.backend), None)
            return self.folded
        centre = value.bn.centre if isinstance(value, Lazy) else None
        centre = _sample_mean(read, stride, self.backend) if centre is None else centre
        gram, total = run("gram", a, centre, *applied, stride, backend=self.backend)
        like = a if like is None else like
        arguments = (self.own.weight.contiguous(), gram, total, centre, like)
        found = run("gram_norm", *arguments, **parameters(self.own, self.settings), backend=self.backend)
        bn, statistics = affine_of(found, like)
        f.folded[self.norm] = Folded(bn, Gram(gram, total, centre))
        f.note(self.norm, statistics)
        return self.folded

    @property
    def folded(self) -> Folded:
        return self.flow.folded[self.norm]

    @property
    def shift(self) -> Tensor:
        """Batch norm's, with the convolution's bias in it."""
        bn, bias = self.folded.bn, self.own.bias
        return bn.shift if bias is None else torch.addcmul(bn.shift, bn.scale, bias.to(bn.scale.dtype))

    @property
    def needs(self) -> StepGrads:
        """What of the convolution's and the norm's tensors wants a gradient."""
        return StepGrads(*self.flow.needs[self.conv][:2], *self.flow.needs[self.norm][2:])

    def note(self, weight: Tensor | None, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> None:
        """Note the gradients of the convolution and of the norm, of those that are wanted."""
        pairs = zip((weight, bias, gamma, beta), self.needs, strict=True)
        wanted = [value if need else None for value, need in pairs]
        self.flow.grads[self.conv] = StepGrads(*wanted[:2])
        self.flow.grads[self.norm] = StepGrads(None, None, *wanted[2:])

    def parameter_grads(
        self, product: Tensor, sum_g: Tensor | None, g: Tensor, folded: Folded, wide: bool = False
    ) -> FoldedGrads:
        """Gradients of the branch's weight and gamma, and what corrects its input's. `product` is not shifted.

        `g`: any tensor of as many pixels as the output. `wide`: in float64, results too, but for the coupling: an error
        there is the same at every pixel, and what lies before the branch sums over pixels.
        """
        (bn, gram), own = folded, self.own
        if not self.settings.batch_stats:
            return self._frozen_grads(product, sum_g, bn)
        weight = own.weight.contiguous()
        if wide:
            bn, gram = bn._replace(rstd=bn.rstd.double(), scale=bn.scale.double()), Gram(*(t.double() for t in gram))
            weight, sum_g = weight.double(), sum_g.double()
        product = product.flatten(1).to(bn.scale.dtype)
        arguments = (weight, product, *gram, sum_g, bn.scale, bn.rstd)
        weight, gamma, coupling, constant = run("gram_grad", *arguments, g, backend=self.backend)
        return FoldedGrads(weight.view(own.weight.shape), gamma, (coupling.to(own.weight.dtype), constant))

    def _frozen_grads(self, product: Tensor, sum_g: Tensor | None, bn: Affine) -> FoldedGrads:
        own, product = self.own, product.to(bn.scale.dtype).view(self.own.weight.shape)
        weight = bn.scale.view(-1, 1, 1, 1) * product
        if not self.needs.gamma:
            return FoldedGrads(weight, None, None)
        sums = torch.float64 if product.device.type == "cpu" else product.dtype  # as in gram_grad: digits cancel
        along = (own.weight.to(product.dtype) * product).sum((1, 2, 3), dtype=sums)
        offset = bn.mean if own.bias is None else bn.mean - own.bias.to(bn.scale.dtype)
        centred = torch.addcmul(along, offset.to(sums), sum_g.to(sums), value=-1).to(product.dtype)
        return FoldedGrads(weight, bn.rstd * centred, None)


def _sample_mean(value: Value, stride: Pixels, backend: str) -> Tensor:
    """Mean of the first few images: to shift by, it need not be that of all, which would cost a pass.

    Of the pixels at `stride`, since the others may hold anything.
    """
    a = value.z if isinstance(value, Lazy) else value
    a = strided(a[:CENTRE_IMAGES], stride)
    if isinstance(value, Lazy):
        a = Lazy(a, value.bn).materialise(backend)
    return run("bn_stats", a, backend=backend)[0]


class TensorBranch(Branch):
    """One on tensors."""

    def product(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and shift of the convolution that is the branch; forward."""
        read = self.flow.tensor(self.source)
        bn, _ = self.fold(strided(read, self.geometry.stride) if self.settings.batch_stats else read)
        return read, scaled_weight(self.own.weight, bn.scale), self.shift

    def backward(self, g: Tensor, sum_g: Tensor) -> None:
        """Gradients of the parameters and of what the convolution read, from the masked gradient and its sum."""
        b, folded, conv, stride, found = self.flow, self.folded, self.geometry, EVERY, None
        read, weight, coupled = b.tensor(self.source), self.own.weight, self.settings.batch_stats
        if conv.is_pointwise(weight) and conv.stride != EVERY:
            read, conv, stride = strided(read, conv.stride), POINTWISE, conv.stride
        centred = coupled and read.element_size() > 2  # in 16 bits a centred input would be rounded once more
        if centred:
            read, folded = self._centred(read)
        if coupled or self.needs.weight or self.needs.gamma:
            # of few channels oneDNN sums all pixels one after the other; there in short sums
            short = weight.shape[1] < FEW_CHANNELS and read.dtype == torch.float32 and conv == POINTWISE
            if short:
                product = run("conv_weight_grad", g, read, weight, *conv.args[:3], backend=self.backend)
            else:
                _, product = gradients(g, read, weight, conv, self.backend, (False, True))
            found = self.parameter_grads(product, sum_g, g, folded, wide=centred)
        bias = torch.zeros_like(sum_g) if coupled else folded.bn.scale * sum_g
        self.note(found and found.weight, bias, found and found.gamma, sum_g)
        if not b.wanted[self.source]:
            return
        scaled = scaled_weight(weight, folded.bn.scale)
        grad, _ = gradients(g, read, scaled, conv, self.backend, (True, False))
        if coupled:
            coupling, constant = found.correction
            constant = _balance(g, sum_g, scaled, folded.gram, coupling) if centred else constant
            own_product.add_relu_(grad, read, coupling, constant, POINTWISE, False, self.backend)
        b.give(self.source, Pending(grad, True, stride))

    def _centred(self, read: Tensor) -> tuple[Tensor, Folded]:
        """What is read less the centre, and the branch as one that reads that: its own centre is 0.

        Otherwise ``g' a - sum_g centre'`` and ``a S - centre S`` would cancel as many digits as the mean has more than
        the deviation, after products have been rounded to float32.
        """
        gram, total, centre = self.folded.gram
        value, along = self.flow.values[self.source], centre.to(read.dtype).view(1, -1, 1, 1)
        readers = self.flow.program.readers(self.source)
        ours = isinstance(value, Lazy) and value.written is None and len(readers) == 1
        d = read.sub_(along) if ours else read - along
        return d, self.folded._replace(gram=Gram(gram, total, torch.zeros_like(centre)))


def scaled_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` with batch norm's scale in it, rounded once to the weight's dtype."""
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def _balance(g: Tensor, sum_g: Tensor, folded_weight: Tensor, gram: Gram, coupling: Tensor) -> Tensor:
    """The constant for which the input's gradient sums to 0 over the pixels, as behind any batch norm it does.

    Of the two matrices as they were rounded: their rounding is the same at every pixel, and what lies before the branch
    sums over pixels.
    """
    sums = sum_g.double() @ folded_weight.flatten(1).double() + gram.total.double() @ coupling.flatten(1).double()
    return (sums / -max(pixels(g.shape), 1)).to(gram.total.dtype)
