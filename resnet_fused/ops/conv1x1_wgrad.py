"""Weight gradient of a 1x1 convolution from a lazy gradient and a lazy activation, over a long M.

Formula (dz and x^ as in :mod:`.lazy`)::

    grad_weight[k, c] = sum_m dz[m, k] * x^[m, c]        x^ at the pixels [::stride, ::stride]
    sum_g[k]          = sum_m dz[m, k]

`g`, `z`: ``[N, K, ceil(H/stride), ceil(W/stride)]``, `x`: ``[N, C, H, W]``, one dtype of float32, bfloat16, float16
(float64 by the reference), channels_last; vectors float32 (float64 for float64): ``[K]`` for a, b, d, scale and shift,
``[C]`` for x_scale and x_shift, ``[N]`` for sample_factor.
`grad_weight`: ``[K, C]`` and `sum_g`: ``[K]``, in the dtype of statistics, the same bits at every call; with `rounded`
grad_weight in that of x. With a masked gradient as dz, both are what the Gram join's backward needs: ``P = g' x^`` and
``sum g`` (``steps.folded_join``).
"""

from __future__ import annotations

from . import lazy
from .contract import Tensor, define, nbytes, stat_dtype, takes_arguments_of, two_launches

SCHEMA = (
    "(Tensor g, Tensor x, Tensor? mask=None, Tensor? z=None, Tensor? a=None, Tensor? b=None, Tensor? d=None, "
    "Tensor? scale=None, Tensor? shift=None, Tensor? sample_factor=None, Tensor? x_scale=None, Tensor? x_shift=None, "
    "int[2] stride=1, bool rounded=False) -> (Tensor grad_weight, Tensor sum_g)"
)
FORMS = f"{lazy.GRADIENT_FORMS} x:~C<stride x_scale,x_shift:C"


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
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    dz = lazy.matrix(lazy.gradient(g, mask, z, a, b, d, scale, shift, sample_factor))
    activation = lazy.matrix(lazy.pixels(lazy.activation(x, x_scale, x_shift), stride))
    dtype = stat_dtype(g.dtype)
    return (dz.T @ activation).to(x.dtype if rounded else dtype), dz.sum(0).to(dtype)


@takes_arguments_of(reference)
def fake(t):
    k, c, dtype = t.g.shape[1], t.x.shape[1], stat_dtype(t.g.dtype)
    return t.g.new_empty((k, c), dtype=t.g.dtype if t.rounded else dtype), t.g.new_empty(k, dtype=dtype)


@takes_arguments_of(reference)
def bytes(t):
    """One read of the lazy gradient and of the pixels of `x`, one write of `grad_weight`."""
    written = t.g.shape[1] * t.x.shape[1] * (t.g.dtype if t.rounded else stat_dtype(t.g.dtype)).itemsize
    return lazy.gradient_bytes(t.g, t.mask, t.z, t.b, t.scale) + nbytes(lazy.pixels(t.x, t.stride)) + written


@takes_arguments_of(reference)
def flops(t):
    """Two per multiply-add."""
    return 2 * t.g.numel() * t.x.shape[1]


OP = define(
    "conv1x1_wgrad",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    forms=FORMS,
    launches=two_launches,
    sums_of_rounded=True,
    ulps=4,
)
