"""First half of the backward of `norm_add_relu`: mask the gradient, emit the sums batch norm needs.

Formula (f = sample_factor[n], absent: 1)::

    keep           = not (out <= 0)           from `mask`, if given: the forward's packed bits (uint8), or its output
                   | not (scale*z + shift <= 0)  recomputed, if there was no residual
                   | 1                         if not relu
    g              = keep ? grad_out : 0       (a select: a NaN gradient where keep is false becomes 0, as in stock)
    sum_g[c]          = sum_m f * g
    sum_gz[c]         = sum_m f * g * (z - mean)  (empty if z is None)
    residual_sum_g[c] = sum_m g                   (empty if residual is None)
    residual_sum_gz[c]= sum_m g * (residual - residual_mean)    (empty if residual is None)

`grad_out`, `z`, `residual`: ``[N, C, H, W]``, one dtype, channels_last; vectors ``[C]`` float32 (float64 for float64).
`residual` is the raw convolution output of a projection shortcut, whose own batch norm needs its two sums. `mean` and
`residual_mean` are what those batch norms subtract, of the batch or running, and come with `z` and `residual`: sums of
g*z would lose their digits where a mean is large beside the deviation. `g` is like grad_out, or empty without
``emit_grad`` (when the reader masks on load, see `lazy_grad_apply`).
"""

from __future__ import annotations

import torch

from .contract import (
    Tensor,
    channels_last,
    channels_last_like,
    define,
    keep_from,
    nbytes,
    one_more_for_sums,
    per_channel,
    per_sample,
    stat_dtype,
    takes_arguments_of,
)

SCHEMA = (
    "(Tensor grad_out, Tensor? z=None, Tensor? mean=None, Tensor? scale=None, Tensor? shift=None, "
    "Tensor? mask=None, Tensor? residual=None, Tensor? residual_mean=None, Tensor? sample_factor=None, "
    "bool relu=True, bool emit_grad=True) "
    "-> (Tensor g, Tensor sum_g, Tensor sum_gz, Tensor residual_sum_g, Tensor residual_sum_gz)"
)
FORMS = "grad_out,z,residual:~C mean,scale,shift,residual_mean:C mask:!C sample_factor:N"


def reference(
    grad_out: Tensor,
    z: Tensor | None = None,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mean: Tensor | None = None,
    sample_factor: Tensor | None = None,
    relu: bool = True,
    emit_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = stat_dtype(grad_out.dtype)
    g = grad_out.to(dtype)
    if relu and mask is not None:
        g = torch.where(keep_from(mask, grad_out), g, torch.zeros_like(g))
    elif relu:
        g = torch.where(~(z.to(dtype) * per_channel(scale) + per_channel(shift) <= 0), g, torch.zeros_like(g))
    wide = g.double() if g.device.type == "cpu" else g  # float64 sums where they are free
    factored = wide if sample_factor is None else wide * per_sample(sample_factor)
    none = grad_out.new_empty(0, dtype=dtype)

    def total(t: Tensor) -> Tensor:
        return t.sum((0, 2, 3)).to(dtype)

    return (
        channels_last(g.to(grad_out.dtype)) if emit_grad else grad_out.new_empty(0),
        total(factored),
        none if z is None else total(factored * (z - per_channel(mean))),
        none.clone() if residual is None else total(wide),
        none.clone() if residual is None else total(wide * (residual - per_channel(residual_mean))),
    )


def fake(
    grad_out: Tensor,
    z: Tensor | None = None,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mean: Tensor | None = None,
    sample_factor: Tensor | None = None,
    relu: bool = True,
    emit_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, c = stat_dtype(grad_out.dtype), grad_out.shape[1]

    def vector(present: bool) -> Tensor:
        return grad_out.new_empty(c if present else 0, dtype=dtype)

    g = channels_last_like(grad_out) if emit_grad else grad_out.new_empty(0)
    return g, vector(True), vector(z is not None), vector(residual is not None), vector(residual is not None)


@takes_arguments_of(reference)
def bytes(t):
    """One read of everything given, one write of `g` where it is emitted."""
    read = nbytes(t.grad_out, t.z, t.mask if t.relu else None, t.residual)
    return read + (nbytes(t.grad_out) if t.emit_grad else 0)


@takes_arguments_of(reference)
def flops(t):
    """One add for each sum, a subtraction and a multiply-add for each product, the sign where there is no mask."""
    recompute = 2 if t.relu and t.mask is None else 0
    return t.grad_out.numel() * (1 + 3 * (t.z is not None) + 4 * (t.residual is not None) + recompute)


OP = define(
    "norm_add_relu_backward",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=one_more_for_sums,
)
