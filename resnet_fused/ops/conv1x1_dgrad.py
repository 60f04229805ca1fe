"""Data gradient of a 1x1 convolution from a lazy gradient, with everything that is added to it and asked of it.

Formula (dz and x^ as in :mod:`.lazy`; terms whose tensors are absent are 0)::

    y      = dz W  +  x^ coupling  +  constant[c]           (coupling, constant: the Gram join's correction)
           | dz  +  x^ coupling  +  constant[c]             weight absent: dz is such a product already, K is C
    grad_x = keep ? y : 0,  keep = not (x_scale*x + x_shift <= 0)        x_scale given: the gradient before bn and relu
           | y + keep * residual                             not given; keep = bit of residual_mask, absent: 1
                                                           (x_scale and residual exclude each other)
    sum_g[c]  = sum_m grad_x                                 x_scale given, of grad_x as rounded; else empty
    sum_gx[c] = sum_m grad_x * (x - x_mean)                  the two sums that batch norm's backward needs
    b, d, grad_gamma = bn_coefficients(...)                  x_rstd given: of them, x_mean, x_rstd, x_scale and the
                                                           pixels of x, and sum_gx empty; else these are empty
    grad_weight = that of :mod:`.conv1x1_wgrad`, rounded   `weight_grad`: of dz and the pixels of x as they were read,
                                                           of x^ where x_scale is given; else empty

`residual` is the gradient of another path into the same tensor: the identity path's, still to be masked by the bits
that its forward wrote, or a strided projection's, which belongs to the pixels
``[::residual_stride, ::residual_stride]``.

Of a strided convolution, this is the gradient of the pixels that it read; `x` is then the tensor that it read them
from, ``[::x_stride, ::x_stride]``.

`g`, `z`: ``[N, K, H, W]``, `grad_x`: ``[N, C, H, W]``, `x`: ``[N, C, H', W']`` with ``H = ceil(H'/x_stride)`` and W
alike, `residual`: ``[N, C, ceil(H/s), ceil(W/s)]``, one dtype of float32, bfloat16, float16 (float64 by the reference),
channels_last; `weight`: ``[K, C, 1, 1]`` and `coupling`: ``[C, C, 1, 1]``, symmetric, of that dtype; vectors float32
(float64 for float64): ``[K]`` for a, b, d, scale and shift, ``[C]`` for x_scale, x_shift, x_mean, x_rstd and
constant, ``[N]`` for sample_factor. `grad_weight`: ``[K, C]``, in the dtype of x. Source of the correction:
``steps.folded_join``.

Both gradients are two passes over dz all the same; but what adds the partial sums of the weight's needs no launch of
its own where the input's follows.
"""

from __future__ import annotations

import torch

from . import bn_coefficients, conv1x1_wgrad, lazy
from .contract import (
    Tensor,
    channels_last,
    channels_last_strides,
    define,
    keep_from,
    nbytes,
    per_channel,
    stat_dtype,
    takes_arguments_of,
)

SCHEMA = (
    "(Tensor g, Tensor? weight, Tensor? mask=None, Tensor? z=None, Tensor? a=None, Tensor? b=None, Tensor? d=None, "
    "Tensor? scale=None, Tensor? shift=None, Tensor? sample_factor=None, Tensor? x=None, Tensor? x_scale=None, "
    "Tensor? x_shift=None, Tensor? x_mean=None, Tensor? coupling=None, Tensor? constant=None, Tensor? residual=None, "
    "Tensor? residual_mask=None, int[2] residual_stride=1, int[2] x_stride=1, Tensor? x_rstd=None, "
    f"bool weight_grad=False) -> (Tensor grad_x, {bn_coefficients.RESULTS}, Tensor grad_weight)"
)
FORMS = f"{lazy.GRADIENT_FORMS} weight:KxC x:~C<x_stride x_scale,x_shift,x_mean,x_rstd:C {lazy.ADDED_FORMS}"


def reference(
    g: Tensor,
    weight: Tensor | None,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    x: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    x_mean: Tensor | None = None,
    coupling: Tensor | None = None,
    constant: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mask: Tensor | None = None,
    residual_stride=(1, 1),
    x_stride=(1, 1),
    x_rstd: Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[Tensor, ...]:
    whole, x = x, None if x is None else lazy.pixels(x, x_stride)
    y, dtype = lazy.gradient(g, mask, z, a, b, d, scale, shift, sample_factor), stat_dtype(g.dtype)
    grad_weight = g.new_empty(0)
    if weight_grad:
        grad_weight = conv1x1_wgrad.reference(y, x, x_scale=x_scale, x_shift=x_shift, rounded=True)[0]
    y = y.to(dtype) if weight is None else lazy.product(y, weight.transpose(0, 1))
    if coupling is not None:
        y = y + lazy.product(lazy.activation(x, x_scale, x_shift), coupling)
    if constant is not None:
        y = y + per_channel(constant)
    none = g.new_empty(0, dtype=dtype)
    if x_scale is None:
        y = y if residual is None else _add_residual(y, residual, residual_mask, residual_stride)
        return channels_last(y.to(g.dtype)), *(none.clone() for _ in range(5)), grad_weight
    keep = ~(x.to(dtype) * per_channel(x_scale) + per_channel(x_shift) <= 0)
    grad_x = channels_last(torch.where(keep, y, torch.zeros_like(y)).to(g.dtype))
    wide = grad_x.double() if g.device.type == "cpu" else grad_x.to(dtype)
    sums = wide.sum((0, 2, 3)).to(dtype), (wide * (x - per_channel(x_mean))).sum((0, 2, 3)).to(dtype)
    return grad_x, *bn_coefficients.after(*sums, x_mean, x_rstd, x_scale, whole), grad_weight


def _add_residual(y: Tensor, residual: Tensor, mask: Tensor | None, stride) -> Tensor:
    r = residual.to(y.dtype)
    if mask is not None:
        r = torch.where(keep_from(mask, residual), r, torch.zeros_like(r))
    y = y.clone()
    y[:, :, :: stride[0], :: stride[1]] += r
    return y


def inputs(t) -> int:
    """Channels of `grad_x`."""
    return t.g.shape[1] if t.weight is None else t.weight.shape[1]


@takes_arguments_of(reference)
def fake(t):
    g, shape = t.g, (t.g.shape[0], inputs(t), *t.g.shape[2:])
    sum_g = g.new_empty(0 if t.x_scale is None else shape[1], dtype=stat_dtype(g.dtype))
    grad_x = g.new_empty_strided(shape, channels_last_strides(shape))
    grad_weight = g.new_empty(t.weight.shape[:2] if t.weight_grad else 0)
    return grad_x, *bn_coefficients.fake_after(sum_g, t.x_rstd), grad_weight


@takes_arguments_of(reference)
def bytes(t):
    """One read of the lazy gradient, the matrices, the pixels of `x` if used, and `residual`; one write of `grad_x`.

    And what the weight's gradient moves, which reads the lazy gradient and x again.
    """
    used = None if t.x_scale is None and t.coupling is None else lazy.pixels(t.x, t.x_stride)
    written = t.g[:, 0].numel() * inputs(t) * t.g.element_size()
    read = nbytes(t.weight, used, t.coupling, t.residual, None if t.residual is None else t.residual_mask)
    gradient = lazy.gradient_bytes(t.g, t.mask, t.z, t.b, t.scale)
    if t.weight_grad:  # as large as the weight
        read, written = read + gradient + nbytes(lazy.pixels(t.x, t.x_stride)), written + nbytes(t.weight)
    return gradient + read + written


@takes_arguments_of(reference)
def flops(t):
    """Two per multiply-add of all products."""
    c, k = inputs(t), 0 if t.weight is None else t.g.shape[1]
    return 2 * t.g[:, 0].numel() * c * (k * (2 if t.weight_grad else 1) + (0 if t.coupling is None else c))


def launches(results: list[Tensor]) -> int:
    """The product, what adds the chunks of sums, and the partial sums of the weight's gradient, a matrix."""
    return 1 + any(t.dim() == 1 for t in results) + any(t.dim() == 2 for t in results)


OP = define(
    "conv1x1_dgrad",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=launches,
    sums_of_rounded=True,
    ulps=4,
)
