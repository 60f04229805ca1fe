"""Sufficient statistics of the input of a 1x1 convolution: shifted Gram matrix and sums.

Formula (M = N*H*W, d = a - centre)::

    gram[i, j] = sum_m d[m, i] * d[m, j]
    total[i]   = sum_m d[m, i]

With them the batch statistics of ``z = W a`` follow without z: ``mean = W (total/M + centre)`` and
``var_k = w_k' (gram/M - total total'/M^2) w_k``. Any `centre` is correct; one near the mean keeps the covariance exact
when \\|mean\\| >> std. `a`: ``[N, C, H, W]`` float32, bfloat16, float16 (float64 on the CPU), channels_last; `centre`:
``[C]`` float32 (float64 for float64). `gram`: ``[C, C]``, `total`: ``[C]``, dtype of centre.
"""

from __future__ import annotations

from .contract import Tensor, define, nbytes

SCHEMA = "(Tensor a, Tensor centre) -> (Tensor gram, Tensor total)"


def reference(a: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    d = a.permute(0, 2, 3, 1).reshape(-1, a.shape[1]).to(centre.dtype) - centre
    wide = d.double() if d.device.type == "cpu" else d
    return (wide.T @ wide).to(centre.dtype), wide.sum(0).to(centre.dtype)


def fake(a: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    c = a.shape[1]
    return centre.new_empty(c, c), centre.new_empty(c)


def bytes(a, centre):
    """One read of `a`, one write of the Gram matrix."""
    return nbytes(a) + a.shape[1] ** 2 * centre.element_size()


def flops(a, centre):
    """The symmetric half is enough: M * C * (C + 1) multiply-adds, half of them."""
    return a.numel() * (a.shape[1] + 1)


OP = define("gram", SCHEMA, reference=reference, fake=fake, bytes=bytes, flops=flops)
