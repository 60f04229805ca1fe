"""First half of the backward of `norm_relu_avg_pool`: the sums that batch norm needs, of a gradient that nobody writes.

Formula, over the pixels m of x::

    keep       = not (scale[c]*x + shift[c] <= 0)
    g          = keep ? (sum of grad_out over the windows that cover the pixel) / |window| : 0
    sum_g[c]   = sum_m g
    sum_gz[c]  = sum_m g * (x - mean[c])        (centred, as in `norm_add_relu_backward`)

`grad_out`: ``[N, C, Ho, Wo]``, channels_last, `x`: ``[N, C, H, W]``, channels_last or some channels of such a tensor
(:func:`.contract.is_slice`, on the CPU), one dtype. Vectors ``[C]`` float32 (float64 for float64), the dtype of g, that
is not rounded. keep is a select: a NaN gradient vanishes where it is false.
"""

from __future__ import annotations

import torch

from .contract import Tensor, define, nbytes, per_channel, stat_dtype, two_launches
from .norm_relu_avg_pool import pooled_shape

SCHEMA = (
    "(Tensor grad_out, Tensor x, Tensor mean, Tensor scale, Tensor shift, int[2] kernel=2, int[2] stride=2) "
    "-> (Tensor sum_g, Tensor sum_gz)"
)
FORMS = "grad_out:^C x:~C mean,scale,shift:C"


def gradient(grad_out, x, scale, shift, kernel, stride) -> Tensor:
    """``g``, in the dtype of statistics: each place of all windows at once, onto the pixels that lie there."""
    dtype, places = stat_dtype(x.dtype), kernel[0] * kernel[1]
    (rows, columns), (sh, sw) = grad_out.shape[2:], stride
    g, grad = x.new_zeros(x.shape, dtype=dtype), grad_out.to(dtype) / places
    for place in range(places):
        top, left = divmod(place, kernel[1])
        g[:, :, top : top + sh * (rows - 1) + 1 : sh, left : left + sw * (columns - 1) + 1 : sw] += grad
    keep = ~(x.to(dtype) * per_channel(scale) + per_channel(shift) <= 0)
    return torch.where(keep, g, torch.zeros_like(g))


def check_shape(op: str, grad_out: Tensor, x: Tensor, kernel, stride) -> None:
    """Raise RuntimeError unless `grad_out` has the shape of the pooled `x`."""
    shape = pooled_shape(x, kernel, stride)
    if tuple(grad_out.shape) != shape:
        text = f"{op}: grad_out has shape {list(grad_out.shape)} but pooling x of shape {list(x.shape)} gives"
        raise RuntimeError(f"{text} {list(shape)}; pass the gradient at that result")


def reference(
    grad_out: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, kernel=(2, 2), stride=(2, 2)
) -> tuple[Tensor, Tensor]:
    check_shape("norm_relu_avg_pool_backward", grad_out, x, kernel, stride)
    g = gradient(grad_out, x, scale, shift, kernel, stride)
    wide = g.double() if g.device.type == "cpu" else g  # float64 sums where they are free
    return tuple(total.sum((0, 2, 3)).to(g.dtype) for total in (wide, wide * (x - per_channel(mean))))


def fake(
    grad_out: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, kernel=(2, 2), stride=(2, 2)
) -> tuple[Tensor, Tensor]:
    check_shape("norm_relu_avg_pool_backward", grad_out, x, kernel, stride)
    dtype, c = stat_dtype(x.dtype), x.shape[1]
    return x.new_empty(c, dtype=dtype), x.new_empty(c, dtype=dtype)


def bytes(grad_out, x, mean, scale, shift, kernel=(2, 2), stride=(2, 2)):
    """One read of `grad_out` and `x`."""
    return nbytes(grad_out, x)


def spread_flops(grad_out, x, kernel):
    """An addition for each place of each window; a division and the recomputed sign for each pixel."""
    return grad_out.numel() * kernel[0] * kernel[1] + 3 * x.numel()


def flops(grad_out, x, mean, scale, shift, kernel=(2, 2), stride=(2, 2)):
    """The spread gradient, two additions and a multiply-add for each element of `x`."""
    return spread_flops(grad_out, x, kernel) + 4 * x.numel()


OP = define(
    "norm_relu_avg_pool_backward",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=two_launches,
)
