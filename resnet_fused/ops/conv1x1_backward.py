"""Both gradients of a 1x1 convolution from one read of its lazy gradient, for layers with few channels on a side.

Formula (dz and x^ as in :mod:`.lazy`; terms whose tensors are absent are 0, an absent weight_scale is 1)::

    grad_weight[k, c] = sum_m dz[m, k] * x^[m, c]
    sum_dz[k]         = sum_m dz[m, k]
    y                 = (weight_scale[k]*dz) W  +  x^ coupling  +  constant[c]
    grad_x            = keep ? y : 0,  keep = not (x_scale*x + x_shift <= 0)    x_mean given
                      | y + keep * residual                                     else; keep = bit of residual_mask
    sum_g[c]          = sum_m grad_x                         x_mean given, of grad_x as rounded; else empty
    sum_gx[c]         = sum_m grad_x * (x - x_mean)
    b, d, grad_gamma  as in `conv1x1_dgrad`                 x_rstd given

They are :mod:`.conv1x1_wgrad` and :mod:`.conv1x1_dgrad` of the same dz, whose docstrings say what the terms are for;
`weight_scale` is batch norm's scale of a Gram join, whose weight gradient wants the gradient without it. What such a
join adds to the gradient of its input follows from grad_weight: without `x_mean`, grad_x stops before the ReLU of a
lazy x, for a `conv1x1_dgrad` without a weight to go on from.

`g`, `z`: ``[N, K, H, W]``, `x`, `grad_x`: ``[N, C, H, W]``, `residual`: ``[N, C, ceil(H/s), ceil(W/s)]``, one dtype,
channels_last; `weight`: ``[K, C, 1, 1]`` and `coupling`: ``[C, C, 1, 1]``, symmetric, of that dtype; vectors float32
(float64 for float64): ``[K]`` for a, b, d, scale, shift and weight_scale, ``[C]`` for x_scale, x_shift, x_mean, x_rstd
and constant, ``[N]`` for sample_factor. `grad_weight`: ``[K, C]`` and the sums in the dtype of statistics, the same
bits at every call; with `rounded` grad_weight in the weight's dtype.
"""

from __future__ import annotations

from . import bn_coefficients, conv1x1_dgrad, conv1x1_wgrad, lazy
from .contract import Tensor, channels_last_strides, define, nbytes, stat_dtype, takes_arguments_of

SCHEMA = (
    "(Tensor g, Tensor weight, Tensor x, Tensor? mask=None, Tensor? z=None, Tensor? a=None, Tensor? b=None, "
    "Tensor? d=None, Tensor? scale=None, Tensor? shift=None, Tensor? sample_factor=None, Tensor? weight_scale=None, "
    "Tensor? x_scale=None, Tensor? x_shift=None, Tensor? x_mean=None, Tensor? coupling=None, Tensor? constant=None, "
    "Tensor? residual=None, Tensor? residual_mask=None, int[2] residual_stride=1, "
    f"Tensor? x_rstd=None, bool rounded=False) "
    f"-> (Tensor grad_x, Tensor grad_weight, Tensor sum_dz, {bn_coefficients.RESULTS})"
)
FORMS = f"{lazy.GRADIENT_FORMS} weight_scale:K weight:KxC x:~C x_scale,x_shift,x_mean,x_rstd:C {lazy.ADDED_FORMS}"


def reference(
    g: Tensor,
    weight: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    x_mean: Tensor | None = None,
    coupling: Tensor | None = None,
    constant: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mask: Tensor | None = None,
    residual_stride=(1, 1),
    x_rstd: Tensor | None = None,
    rounded: bool = False,
) -> tuple[Tensor, ...]:
    dz = lazy.gradient(g, mask, z, a, b, d, scale, shift, sample_factor)
    grad_weight, sum_dz, *_ = conv1x1_wgrad.reference(dz, x, x_scale=x_scale, x_shift=x_shift, rounded=rounded)
    added = {"coupling": coupling, "constant": constant, "residual": residual}
    added |= {"residual_mask": residual_mask, "residual_stride": residual_stride, "a": weight_scale}
    if x_mean is not None:
        added |= {"x": x, "x_scale": x_scale, "x_shift": x_shift, "x_mean": x_mean, "x_rstd": x_rstd}
    else:
        added |= {"x": lazy.activation(x, x_scale, x_shift)}
    grad_x, *sums, _ = conv1x1_dgrad.reference(dz, weight, **added)
    return grad_x, grad_weight, sum_dz, *sums


#: The arguments of a call by name, defaults included.
arguments = takes_arguments_of(reference)(lambda t: t)


@takes_arguments_of(reference)
def fake(t):
    g, (k, c), dtype = t.g, t.weight.shape[:2], stat_dtype(t.g.dtype)
    grad_x = g.new_empty_strided(t.x.shape, channels_last_strides(t.x.shape))
    grad_weight = g.new_empty((k, c), dtype=g.dtype if t.rounded else dtype)
    sum_g = g.new_empty(0 if t.x_mean is None else c, dtype=dtype)
    return grad_x, grad_weight, g.new_empty(k, dtype=dtype), *bn_coefficients.fake_after(sum_g, t.x_rstd)


@takes_arguments_of(reference)
def bytes(t):
    """One read of the lazy gradient, the matrices, `x` and `residual`; one write of both gradients."""
    written = nbytes(t.x) + t.weight.shape[:2].numel() * (t.g.dtype if t.rounded else stat_dtype(t.g.dtype)).itemsize
    read = nbytes(t.weight, t.x, t.coupling, t.residual, None if t.residual is None else t.residual_mask)
    return lazy.gradient_bytes(t.g, t.mask, t.z, t.b, t.scale) + read + written


@takes_arguments_of(reference)
def flops(t):
    """Two per multiply-add of the products."""
    k, c = t.weight.shape[:2]
    return 2 * t.g[:, 0].numel() * c * (2 * k + (0 if t.coupling is None else c))


def launches(results) -> int:
    """Both gradients; the sum of the weight's; where there are more results, those of the other sums too."""
    return 2 if len(results) == 3 else 3


OP = define(
    "conv1x1_backward",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    forms=FORMS,
    launches=launches,
    sums_of_rounded=True,
    ulps=4,
)
