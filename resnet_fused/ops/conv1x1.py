"""1x1 convolution of a plain or lazy activation, with the batch statistics of its result: one read, one write.

Formula (x^ as in :mod:`.lazy`)::

    z    = x^[:, :, ::stride, ::stride] W'      rounded to the dtype of x
    mean, m2 = bn_stats(z)                      with emit_stats, of z as rounded; else empty
    with eps, the results of `bn_affine` instead of m2, as in `bn_stats`

`x`: ``[N, C, H, W]`` float32, bfloat16, float16 (float64 by the reference), channels_last; `weight`: ``[K, C, 1, 1]``
of the same dtype; `x_scale`, `x_shift`: ``[C]`` float32 (float64 for float64), both or neither. `z`:
``[N, K, ceil(H/stride), ceil(W/stride)]``; `gamma`, `beta`: ``[K]``, any floating dtype; all other results: ``[K]``,
in the dtype of statistics, merged by Chan's rule.
"""

from __future__ import annotations

import math

from . import bn_affine, bn_stats, lazy
from .contract import (
    Tensor,
    channels_last,
    channels_last_strides,
    define,
    nbytes,
    one_more_for_sums,
    stat_dtype,
    takes_arguments_of,
)

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? x_scale=None, Tensor? x_shift=None, int[2] stride=1, bool emit_stats=True, "
    f"{bn_affine.PARAMETERS}) -> (Tensor z, {bn_affine.RESULTS})"
)
FORMS = "x:~C<stride weight:KxC x_scale,x_shift:C gamma,beta:K"


def reference(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    stride=(1, 1),
    emit_stats: bool = True,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    a = lazy.pixels(lazy.activation(x, x_scale, x_shift), stride)
    z = channels_last(lazy.product(a, weight).to(x.dtype))
    return z, *bn_stats.emitted(z, emit_stats, gamma, beta, eps)


@takes_arguments_of(reference)
def fake(t):
    shape = lazy.strided_shape(t.x, t.weight.shape[0], t.stride)
    z = t.x.new_empty_strided(shape, channels_last_strides(shape))
    return z, *bn_affine.fake_after(t.x.new_empty(shape[1] if t.emit_stats else 0, dtype=stat_dtype(t.x.dtype)), t.eps)


@takes_arguments_of(reference)
def bytes(t):
    """One read of the pixels of `x` and of `weight`, one write of `z`."""
    out = math.prod(lazy.strided_shape(t.x, t.weight.shape[0], t.stride)) * t.x.element_size()
    return nbytes(lazy.pixels(t.x, t.stride), t.weight) + out


@takes_arguments_of(reference)
def flops(t):
    """Two per multiply-add of the convolution; prologue and epilogue are not counted."""
    return 2 * math.prod(lazy.strided_shape(t.x, t.weight.shape[0], t.stride)) * t.x.shape[1]


OP = define(
    "conv1x1",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    forms=FORMS,
    compiled=True,
    launches=one_more_for_sums,
    sums_of_rounded=True,
    ulps=4,
)
