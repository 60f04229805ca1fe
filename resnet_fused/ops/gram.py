"""Sufficient statistics of the input of a 1x1 convolution: shifted Gram matrix and sums.

Formula (x^ as in :mod:`.lazy`, of `a`, `scale` and `shift`; M pixels, those of the convolution's output)::

    d          = x^ - centre                  at the pixels [::stride, ::stride]
    gram[i, j] = sum_m d[m, i] * d[m, j]      of d rounded to the dtype of a; a kernel may round less
    total[i]   = sum_m d[m, i]

With them the batch statistics of ``z = W x^`` follow without z: ``mean = W (total/M + centre)`` and
``var_k = w_k' (gram/M - total total'/M^2) w_k``. Any `centre` is correct; one near the mean keeps the covariance exact
when \\|mean\\| >> std. `a`: ``[N, C, H, W]`` float32, bfloat16, float16 (float64 on the CPU), channels_last; `centre`,
`scale`, `shift`: ``[C]`` float32 (float64 for float64). `gram`: ``[C, C]``, `total`: ``[C]``, dtype of centre.
"""

from __future__ import annotations

from . import lazy
from .contract import Tensor, define, nbytes, per_channel, two_launches

SCHEMA = (
    "(Tensor a, Tensor centre, Tensor? scale=None, Tensor? shift=None, int[2] stride=1) -> (Tensor gram, Tensor total)"
)
FORMS = "a:~C<stride centre,scale,shift:C"


def reference(
    a: Tensor, centre: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, stride=(1, 1)
) -> tuple[Tensor, Tensor]:
    d = lazy.activation(lazy.pixels(a, stride), scale, shift).to(centre.dtype) - per_channel(centre)
    rounded = lazy.matrix(d.to(a.dtype))
    return (rounded.T @ rounded).to(centre.dtype), lazy.matrix(d).sum(0).to(centre.dtype)


def fake(
    a: Tensor, centre: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, stride=(1, 1)
) -> tuple[Tensor, Tensor]:
    c = a.shape[1]
    return centre.new_empty(c, c), centre.new_empty(c)


def bytes(a, centre, scale=None, shift=None, stride=(1, 1)):
    """One read of the pixels of `a`, one write of the Gram matrix."""
    return nbytes(lazy.pixels(a, stride)) + a.shape[1] ** 2 * centre.element_size()


def flops(a, centre, scale=None, shift=None, stride=(1, 1)):
    """The symmetric half is enough: M * C * (C + 1) multiply-adds, half of them."""
    return lazy.pixels(a, stride).numel() * (a.shape[1] + 1)


OP = define(
    "gram",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=two_launches,
    sums_of_rounded=True,
)
