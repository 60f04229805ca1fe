"""Weight gradient of a 1x1 convolution from a lazy gradient and a lazy activation, over a long M.

Formula (dz and x^ as in :mod:`.lazy`)::

    grad_weight[k, c] = sum_m dz[m, k] * x^[m, c]        x^ at the pixels [::stride, ::stride]
    sum_g[k]          = sum_m dz[m, k]

`g`, `z`: ``[N, K, ceil(H/stride), ceil(W/stride)]``, `x`: ``[N, C, H, W]``, one dtype of float32, bfloat16, float16
(float64 by the reference), channels_last; vectors float32 (float64 for float64): ``[K]`` for a, b, d, scale and shift,
``[C]`` for x_scale and x_shift, ``[N]`` for sample_factor. `grad_weight`: ``[K, C]`` and `sum_g`: ``[K]``, in the dtype
of statistics, the same bits at every call. With a masked gradient as dz, both are what the Gram join's backward needs:
``P = g' x^`` and ``sum g`` (``steps.folded_join``).
"""

from __future__ import annotations

from . import lazy
from .contract import Tensor, define, nbytes, stat_dtype

SCHEMA = (
    "(Tensor g, Tensor x, Tensor? mask=None, Tensor? z=None, Tensor? a=None, Tensor? b=None, Tensor? d=None, "
    "Tensor? scale=None, Tensor? shift=None, Tensor? sample_factor=None, Tensor? x_scale=None, Tensor? x_shift=None, "
    "int[2] stride=1) -> (Tensor grad_weight, Tensor sum_g)"
)


def reference(
    g: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    stride=(1, 1),
) -> tuple[Tensor, Tensor]:
    dz = lazy.matrix(lazy.gradient(g, mask, z, a, b, d, scale, shift, sample_factor))
    activation = lazy.matrix(lazy.pixels(lazy.activation(x, x_scale, x_shift), stride))
    dtype = stat_dtype(g.dtype)
    return (dz.T @ activation).to(dtype), dz.sum(0).to(dtype)


def fake(
    g: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    stride=(1, 1),
) -> tuple[Tensor, Tensor]:
    dtype = stat_dtype(g.dtype)
    return g.new_empty((g.shape[1], x.shape[1]), dtype=dtype), g.new_empty(g.shape[1], dtype=dtype)


def bytes(
    g,
    x,
    mask=None,
    z=None,
    a=None,
    b=None,
    d=None,
    scale=None,
    shift=None,
    sample_factor=None,
    x_scale=None,
    x_shift=None,
    stride=(1, 1),
):
    """One read of the lazy gradient and of the pixels of `x`, one write of `grad_weight`."""
    written = g.shape[1] * x.shape[1] * stat_dtype(g.dtype).itemsize
    return lazy.gradient_bytes(g, mask, z, b, scale) + nbytes(lazy.pixels(x, stride)) + written


def flops(
    g,
    x,
    mask=None,
    z=None,
    a=None,
    b=None,
    d=None,
    scale=None,
    shift=None,
    sample_factor=None,
    x_scale=None,
    x_shift=None,
    stride=(1, 1),
):
    """Two per multiply-add."""
    return 2 * g.numel() * x.shape[1]


OP = define("conv1x1_wgrad", SCHEMA, reference=reference, fake=fake, bytes=bytes, flops=flops)
