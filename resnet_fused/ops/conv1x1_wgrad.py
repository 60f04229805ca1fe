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

With the Gram join's small matrices (`join_weight`: ``[K, C, 1, 1]`` of the dtype of x, `gram`: ``[C, C]``, `total`,
`centre`: ``[C]``, `join_scale`, `join_rstd`: ``[K]``, all or none), :mod:`.gram_grad` follows: grad_weight is its, in
the dtype of x, and its grad_gamma, coupling and constant are returned too; a GPU starts a kernel less. Else those three
are empty.
"""

from __future__ import annotations

from . import gram_grad, lazy
from .contract import Tensor, define, nbytes, stat_dtype, takes_arguments_of

SCHEMA = (
    "(Tensor g, Tensor x, Tensor? mask=None, Tensor? z=None, Tensor? a=None, Tensor? b=None, Tensor? d=None, "
    "Tensor? scale=None, Tensor? shift=None, Tensor? sample_factor=None, Tensor? x_scale=None, Tensor? x_shift=None, "
    "int[2] stride=1, bool rounded=False, Tensor? join_weight=None, Tensor? gram=None, Tensor? total=None, "
    "Tensor? centre=None, Tensor? join_scale=None, Tensor? join_rstd=None) "
    "-> (Tensor grad_weight, Tensor sum_g, Tensor grad_gamma, Tensor coupling, Tensor constant)"
)
FORMS = (
    f"{lazy.GRADIENT_FORMS} x:~C<stride x_scale,x_shift,total,centre:C join_weight:KxC gram:C*C join_scale,join_rstd:K"
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
    rounded: bool = False,
    join_weight: Tensor | None = None,
    gram: Tensor | None = None,
    total: Tensor | None = None,
    centre: Tensor | None = None,
    join_scale: Tensor | None = None,
    join_rstd: Tensor | None = None,
) -> tuple[Tensor, ...]:
    dz = lazy.matrix(lazy.gradient(g, mask, z, a, b, d, scale, shift, sample_factor))
    activation = lazy.matrix(lazy.pixels(lazy.activation(x, x_scale, x_shift), stride))
    dtype = stat_dtype(g.dtype)
    product, sum_g = dz.T @ activation, dz.sum(0).to(dtype)
    if join_weight is None:
        return product.to(x.dtype if rounded else dtype), sum_g, *_nothing(g)
    join = (join_weight, product.to(dtype), gram, total, centre, sum_g, join_scale, join_rstd, g)
    grad_weight, *others = gram_grad.reference(*join)
    return grad_weight, sum_g, *others


def _nothing(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What only a Gram join has."""
    vector = g.new_empty(0, dtype=stat_dtype(g.dtype))
    return vector, g.new_empty(0), vector.clone()


@takes_arguments_of(reference)
def fake(t):
    k, c, dtype = t.g.shape[1], t.x.shape[1], stat_dtype(t.g.dtype)
    joined, vector = t.join_weight is not None, t.g.new_empty(t.g.shape[1], dtype=dtype)
    grad_weight = t.g.new_empty((k, c), dtype=t.g.dtype if t.rounded or joined else dtype)
    if not joined:
        return grad_weight, vector, *_nothing(t.g)
    return grad_weight, vector, vector.new_empty(k), t.g.new_empty(c, c, 1, 1), vector.new_empty(c)


@takes_arguments_of(reference)
def bytes(t):
    """One read of the lazy gradient and of the pixels of `x`, one write of `grad_weight`.

    Of a Gram join also a read of `gram`, two of its weight (see :func:`.gram_grad.bytes`), and a write of the coupling.
    """
    joined, (k, c) = t.join_weight is not None, (t.g.shape[1], t.x.shape[1])
    written = k * c * (t.g.dtype if t.rounded or joined else stat_dtype(t.g.dtype)).itemsize
    written += c * c * t.g.element_size() if joined else 0
    read = nbytes(lazy.pixels(t.x, t.stride), t.join_weight, t.join_weight, t.gram)
    return lazy.gradient_bytes(t.g, t.mask, t.z, t.b, t.scale) + read + written


@takes_arguments_of(reference)
def flops(t):
    """Two per multiply-add; and those of :mod:`.gram_grad`."""
    return 2 * t.g.numel() * t.x.shape[1] + _join_flops(t)


def _join_flops(t) -> int:
    return 0 if t.join_weight is None else gram_grad.flops(t.join_weight, *[None] * 8)


def launches(results: list[Tensor]) -> int:
    """Partial sums, and what adds them; of a Gram join, what is made of their sums too."""
    return 2 if len(results) <= 2 else 3


OP = define(
    "conv1x1_wgrad",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    full_flops=takes_arguments_of(reference)(_join_flops),
    compiled=True,
    forms=FORMS,
    launches=launches,
    sums_of_rounded=True,
    ulps=4,
)
