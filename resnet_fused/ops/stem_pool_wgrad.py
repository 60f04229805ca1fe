"""Weight gradient of a stem's convolution of few channels from the gradient behind its norm, ReLU and max pool.

Formula::

    dz     = norm_relu_pool_apply(grad_out, index, z, a, b, d, scale, shift, pool_kernel, pool_stride, pool_padding)
    grad_w = stem_conv_wgrad(dz, x, weight, stride, padding)

Arguments are those of both; float32. dz, as large as z, is made in the cache and never written: for where nobody wants
the gradient of `x`, an image.
"""

from __future__ import annotations

import torch

from . import norm_relu_pool_apply, stem_conv_wgrad
from .contract import Tensor, define, nbytes, takes_arguments_of, two_launches

SCHEMA = (
    "(Tensor grad_out, Tensor index, Tensor z, Tensor a, Tensor? b, Tensor? d, Tensor scale, Tensor shift, Tensor x, "
    "Tensor weight, int[2] stride=1, int[2] padding=0, int[2] pool_kernel=3, int[2] pool_stride=2, "
    "int[2] pool_padding=1) -> Tensor grad_w"
)


def reference(
    grad_out: Tensor,
    index: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    x: Tensor,
    weight: Tensor,
    stride=(1, 1),
    padding=(0, 0),
    pool_kernel=(3, 3),
    pool_stride=(2, 2),
    pool_padding=(1, 1),
) -> Tensor:
    window = pool_kernel, pool_stride, pool_padding
    dz = norm_relu_pool_apply.reference(grad_out, index, z, a, b, d, scale, shift, *window)
    return stem_conv_wgrad.reference(dz, x, weight, stride, padding)


@takes_arguments_of(reference)
def fake(a) -> Tensor:
    return torch.empty_like(a.weight)


@takes_arguments_of(reference)
def bytes(a) -> int:
    """One read of `grad_out`, `index`, `z` and `x`, one write of `grad_w`."""
    return nbytes(a.grad_out, a.index, a.z, a.x, a.weight)


@takes_arguments_of(reference)
def flops(a) -> int:
    """Those of both."""
    window = a.pool_kernel, a.pool_stride, a.pool_padding
    made = norm_relu_pool_apply.flops(a.grad_out, a.index, a.z, a.a, a.b, a.d, a.scale, a.shift, *window)
    return made + stem_conv_wgrad.flops(a.z, a.x, a.weight)


OP = define(
    "stem_pool_wgrad",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    launches=two_launches,
    ulps=4,
)
