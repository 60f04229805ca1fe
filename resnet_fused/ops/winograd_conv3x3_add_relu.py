"""A dense 3x3 convolution of stride 1 by a transformed weight that is kept; shift, sum and ReLU before the only write.

Formula::

    y   = scale[k] * conv2d(x, weight, padding=padding) + shift[k] + residual     (absent: 1, 0, 0)
    out = y < 0 ? 0 : y  if relu else y

`packed` is what :mod:`.winograd_weight3x3` makes of `weight` and `scale`, and what the sums are made of: F(2x2, 3x3) or
F(4x4, 3x3), by its shape. `weight` and `scale` are read where a sum is not finite: then all are ATen's, so that NaN and
infinities reach what they reach there. F(2x2) keeps zeros, and its rounding error is at most stock's, see
`winograd_conv3x3`. F(4x4) has 16/9 fewer multiplications; the inputs of a tile of 4x4 outputs meet in all of them, and
cancel up to rounding: its error is relative to the largest values in a tile, and what would be 0 need not be.

`x`: ``[N, C, H, W]``, `residual`, `out`: ``[N, K, H+2p-2, W+2p-2]``, channels_last; `weight`: ``[K, C, 3, 3]``, of any
strides; `scale`, `shift`: ``[K]``; padding p: 0 or 1. float32.
"""

from __future__ import annotations

import torch

from .contract import Tensor, channels_last, channels_last_strides, define, nbytes, per_channel, takes_arguments_of

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor packed, Tensor? scale=None, Tensor? shift=None, Tensor? residual=None, "
    "int padding=1, bool relu=False) -> Tensor out"
)


def reference(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    padding: int = 1,
    relu: bool = False,
) -> Tensor:
    y = torch.nn.functional.conv2d(x, weight, padding=padding)
    if scale is not None:
        y = y * per_channel(scale)
    if shift is not None:
        y = y + per_channel(shift)
    if residual is not None:
        y = y + residual
    return channels_last((torch.relu(y) if relu else y).to(x.dtype))


def _shape(x: Tensor, weight: Tensor, padding: int) -> tuple[int, int, int, int]:
    n, _, h, w = x.shape
    return n, weight.shape[0], h + 2 * padding - 2, w + 2 * padding - 2


@takes_arguments_of(reference)
def fake(a) -> Tensor:
    shape = _shape(a.x, a.weight, a.padding)
    return a.x.new_empty_strided(shape, channels_last_strides(shape))


@takes_arguments_of(reference)
def bytes(a) -> int:
    """One read of `x`, `packed` and `residual`, one write of `out`."""
    n, k, p, q = _shape(a.x, a.weight, a.padding)
    return nbytes(a.x, a.packed, a.residual) + n * k * p * q * a.x.element_size()


@takes_arguments_of(reference)
def flops(a) -> int:
    """Those of the direct sum, two per multiply-add, whatever fewer the algorithm gets by with."""
    n, _, p, q = _shape(a.x, a.weight, a.padding)
    return 2 * n * p * q * a.weight.numel()


OP = define(
    "winograd_conv3x3_add_relu",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    ulps=4,
)
