"""Second half of the backward of `norm_relu_avg_pool`: the gradient at what was normalised, written once.

Formula::

    keep   = not (scale[c]*x + shift[c] <= 0)
    g      = keep ? (sum of grad_out over the windows that cover the pixel) / |window| : 0
    grad_x = a[c]*g + b[c]*x + d[c]               (b and d None, as for frozen batch norm: 0)

`grad_out`: ``[N, C, Ho, Wo]``, channels_last, `x`: ``[N, C, H, W]``, channels_last or some channels of such a tensor
(:func:`.contract.is_slice`, on the CPU), one dtype. Vectors ``[C]`` float32 (float64 for float64), the dtype of all
arithmetic. `grad_x`: like x, channels_last, rounded once. g is that of `norm_relu_avg_pool_backward`; a, b and d are
those of `lazy_grad_apply`.
"""

from __future__ import annotations

from .contract import Tensor, channels_last, channels_last_like, define, nbytes, per_channel
from .norm_relu_avg_pool_backward import check_shape, gradient, spread_flops

SCHEMA = (
    "(Tensor grad_out, Tensor x, Tensor a, Tensor? b, Tensor? d, Tensor scale, Tensor shift, int[2] kernel=2, "
    "int[2] stride=2) -> Tensor grad_x"
)
FORMS = "grad_out:^C x:~C a,b,d,scale,shift:C"


def reference(
    grad_out: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    kernel=(2, 2),
    stride=(2, 2),
) -> Tensor:
    check_shape("norm_relu_avg_pool_apply", grad_out, x, kernel, stride)
    grad_x = gradient(grad_out, x, scale, shift, kernel, stride) * per_channel(a)
    if b is not None:
        grad_x = grad_x + (per_channel(b) * x.to(b.dtype) + per_channel(d))
    return channels_last(grad_x.to(x.dtype))


def fake(
    grad_out: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    kernel=(2, 2),
    stride=(2, 2),
) -> Tensor:
    check_shape("norm_relu_avg_pool_apply", grad_out, x, kernel, stride)
    return channels_last_like(x)


def bytes(grad_out, x, a, b, d, scale, shift, kernel=(2, 2), stride=(2, 2)):
    """One read of `grad_out` and `x`, one write of `grad_x`."""
    return nbytes(grad_out) + 2 * nbytes(x)


def flops(grad_out, x, a, b, d, scale, shift, kernel=(2, 2), stride=(2, 2)):
    """The spread gradient, and the multiply-adds of the affine map."""
    return spread_flops(grad_out, x, kernel) + x.numel() * (1 + 3 * (b is not None))


OP = define(
    "norm_relu_avg_pool_apply",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
)
