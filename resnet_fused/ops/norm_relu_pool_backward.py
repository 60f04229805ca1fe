"""First half of the backward of `norm_relu_pool`: the sums that batch norm needs, of a gradient that nobody writes.

Formula, over the pixels m of z::

    keep       = not (scale[c]*z + shift[c] <= 0)
    g          = keep ? (sum of grad_out over the windows whose index points at the pixel) : 0
    sum_g[c]   = sum_m g
    sum_gz[c]  = sum_m g * (z - mean[c])        (centred, as in `norm_add_relu_backward`)

`grad_out`: ``[N, C, Ho, Wo]``, `z`: ``[N, C, H, W]``, one dtype; `index`: uint8, as `norm_relu_pool` gave it; all
channels_last. Vectors ``[C]`` float32 (float64 for float64), the dtype of g, which is not rounded. Each pixel gathers
from the rows and columns of windows that cover it, at most ``ceil(kernel / stride)`` of each. Both choices are selects:
a NaN gradient reaches only its winner, and vanishes where keep is false.
"""

from __future__ import annotations

import torch

from .contract import Tensor, define, nbytes, per_channel, stat_dtype, two_launches
from .norm_relu_pool import pooled_shape

SCHEMA = (
    "(Tensor grad_out, Tensor index, Tensor z, Tensor mean, Tensor scale, Tensor shift, int[2] kernel=3, "
    "int[2] stride=2, int[2] padding=1) -> (Tensor sum_g, Tensor sum_gz)"
)
FORMS = "grad_out,index:^C z:~C mean,scale,shift:C"


def gradient(grad_out, index, z, scale, shift, kernel, stride, padding) -> Tensor:
    """``g``, in the dtype of statistics: each place of all windows at once, onto the pixels that lie there."""
    dtype = stat_dtype(z.dtype)
    n, c, h, w = z.shape
    (ph, pw), (sh, sw), (rows, columns) = padding, stride, grad_out.shape[2:]
    padded = z.new_zeros((n, c, h + 2 * ph, w + 2 * pw), dtype=dtype)
    grad = grad_out.to(dtype)
    for place in range(kernel[0] * kernel[1]):
        top, left = divmod(place, kernel[1])
        under = padded[:, :, top : top + sh * (rows - 1) + 1 : sh, left : left + sw * (columns - 1) + 1 : sw]
        under += torch.where(index == place, grad, torch.zeros_like(grad))
    g = padded[:, :, ph : ph + h, pw : pw + w]
    keep = ~(z.to(dtype) * per_channel(scale) + per_channel(shift) <= 0)
    return torch.where(keep, g, torch.zeros_like(g))


def check_shapes(op: str, grad_out: Tensor, index: Tensor, z: Tensor, kernel, stride, padding) -> None:
    """Raise RuntimeError unless `grad_out` and `index` have the shape of the pooled `z`."""
    shape = pooled_shape(z, kernel, stride, padding)
    for name, t in (("grad_out", grad_out), ("index", index)):
        if tuple(t.shape) != shape:
            text = f"{op}: {name} has shape {list(t.shape)} but pooling z of shape {list(z.shape)} gives {list(shape)}"
            raise RuntimeError(f"{text}; pass {'the gradient at' if t is grad_out else 'what came with'} that result")


def reference(
    grad_out: Tensor,
    index: Tensor,
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel=(3, 3),
    stride=(2, 2),
    padding=(1, 1),
) -> tuple[Tensor, Tensor]:
    check_shapes("norm_relu_pool_backward", grad_out, index, z, kernel, stride, padding)
    g = gradient(grad_out, index, z, scale, shift, kernel, stride, padding)
    wide = g.double() if g.device.type == "cpu" else g  # float64 sums where they are free
    return tuple(total.sum((0, 2, 3)).to(g.dtype) for total in (wide, wide * (z - per_channel(mean))))


def fake(
    grad_out: Tensor,
    index: Tensor,
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel=(3, 3),
    stride=(2, 2),
    padding=(1, 1),
) -> tuple[Tensor, Tensor]:
    check_shapes("norm_relu_pool_backward", grad_out, index, z, kernel, stride, padding)
    dtype, c = stat_dtype(z.dtype), z.shape[1]
    return z.new_empty(c, dtype=dtype), z.new_empty(c, dtype=dtype)


def bytes(grad_out, index, z, mean, scale, shift, kernel=(3, 3), stride=(2, 2), padding=(1, 1)):
    """One read of `grad_out`, `index` and `z`."""
    return nbytes(grad_out, index, z)


def gather_flops(grad_out, z, kernel):
    """A comparison for each place of each window, and an addition for each window; the recomputed sign."""
    return grad_out.numel() * (kernel[0] * kernel[1] + 1) + 2 * z.numel()


def flops(grad_out, index, z, mean, scale, shift, kernel=(3, 3), stride=(2, 2), padding=(1, 1)):
    """The gathered gradient, two additions and a multiply-add for each element of `z`."""
    return gather_flops(grad_out, z, kernel) + 4 * z.numel()


OP = define(
    "norm_relu_pool_backward",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=two_launches,
)
