"""Second half of the backward of `norm_relu_pool`: the gradient at the raw convolution output, written once.

Formula::

    keep = not (scale[c]*z + shift[c] <= 0)
    g    = keep ? (sum of grad_out over the windows whose index points at the pixel) : 0
    dz   = a[c]*g + b[c]*z + d[c]                 (b and d None, as for frozen batch norm: 0)

`grad_out`: ``[N, C, Ho, Wo]``, `z`: ``[N, C, H, W]``, one dtype; `index`: uint8, as `norm_relu_pool` gave it; all
channels_last. Vectors ``[C]`` float32 (float64 for float64), the dtype of all arithmetic. `dz`: like z, rounded once.
The same g as in `norm_relu_pool_backward`; a, b and d are those of `lazy_grad_apply`.
"""

from __future__ import annotations

from .contract import Tensor, channels_last, channels_last_like, define, nbytes, per_channel
from .norm_relu_pool_backward import check_shapes, gather_flops, gradient

SCHEMA = (
    "(Tensor grad_out, Tensor index, Tensor z, Tensor a, Tensor? b, Tensor? d, Tensor scale, Tensor shift, "
    "int[2] kernel=3, int[2] stride=2, int[2] padding=1) -> Tensor dz"
)
FORMS = "grad_out,index:^C z:~C a,b,d,scale,shift:C"


def reference(
    grad_out: Tensor,
    index: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    kernel=(3, 3),
    stride=(2, 2),
    padding=(1, 1),
) -> Tensor:
    check_shapes("norm_relu_pool_apply", grad_out, index, z, kernel, stride, padding)
    dz = gradient(grad_out, index, z, scale, shift, kernel, stride, padding) * per_channel(a)
    if b is not None:
        dz = dz + (per_channel(b) * z.to(b.dtype) + per_channel(d))
    return channels_last(dz.to(z.dtype))


def fake(
    grad_out: Tensor,
    index: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    kernel=(3, 3),
    stride=(2, 2),
    padding=(1, 1),
) -> Tensor:
    check_shapes("norm_relu_pool_apply", grad_out, index, z, kernel, stride, padding)
    return channels_last_like(z)


def bytes(grad_out, index, z, a, b, d, scale, shift, kernel=(3, 3), stride=(2, 2), padding=(1, 1)):
    """One read of `grad_out`, `index` and `z`, one write of `dz`."""
    return nbytes(grad_out, index) + 2 * nbytes(z)


def flops(grad_out, index, z, a, b, d, scale, shift, kernel=(3, 3), stride=(2, 2), padding=(1, 1)):
    """The gathered gradient, and the multiply-adds of the affine map."""
    return gather_flops(grad_out, z, kernel) + z.numel() * (1 + 3 * (b is not None))


OP = define(
    "norm_relu_pool_apply",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
)
