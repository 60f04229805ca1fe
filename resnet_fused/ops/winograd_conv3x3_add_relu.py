"""A dense 3x3 convolution by a transformed weight that is kept; shift, sum and ReLU before the only write.

Formula::

    y   = scale[k] * conv2d(x, weight, padding=padding, stride=stride) + shift[k] + residual     (absent: 1, 0, 0)
    out = y < 0 ? 0 : y  if relu else y

`packed` is what :mod:`.winograd_weight3x3` makes of `weight`, `scale` and `stride`, and what the sums are made of:
F(2x2, 3x3) or F(4x4, 3x3), by its shape, or F(2x2, 3x3) of a stride of 2. `weight` and `scale` are read where a sum is
not finite: then all are ATen's, so that NaN and infinities reach what they reach there. F(2x2) keeps zeros, and its
rounding error is at most stock's, see `winograd_conv3x3`; with a stride of 2, where 25 products stand for 36, it is 0.9
to 1.5 of stock's. F(4x4) has 16/9 fewer multiplications; the inputs of a tile of 4x4 outputs meet in all of them, and
cancel up to rounding: its error is relative to the largest values in a tile, and what would be 0 need not be.

`x`: ``[N, C, H, W]``, `residual`, `out`: ``[N, K, (H+2p-3)//s+1, (W+2p-3)//s+1]``, channels_last; `weight`:
``[K, C, 3, 3]``, of any strides; `scale`, `shift`: ``[K]``; padding p: 0 or 1; stride s: 1, or 2 where C is a multiple
of 16. float32.
"""

from __future__ import annotations

import torch

from .contract import Tensor, channels_last, channels_last_strides, define, nbytes, per_channel, takes_arguments_of

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor packed, Tensor? scale=None, Tensor? shift=None, Tensor? residual=None, "
    "int padding=1, bool relu=False, int stride=1) -> Tensor out"
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
    stride: int = 1,
) -> Tensor:
    y = torch.nn.functional.conv2d(x, weight, padding=padding, stride=stride)
    if scale is not None:
        y = y * per_channel(scale)
    if shift is not None:
        y = y + per_channel(shift)
    if residual is not None:
        y = y + residual
    return channels_last((torch.relu(y) if relu else y).to(x.dtype))


def _shape(a) -> tuple[int, int, int, int]:
    n, _, h, w = a.x.shape
    p, q = ((size + 2 * a.padding - 3) // a.stride + 1 for size in (h, w))
    return n, a.weight.shape[0], p, q


@takes_arguments_of(reference)
def fake(a) -> Tensor:
    shape = _shape(a)
    return a.x.new_empty_strided(shape, channels_last_strides(shape))


@takes_arguments_of(reference)
def bytes(a) -> int:
    """One read of `x`, `packed` and `residual`, one write of `out`."""
    n, k, p, q = _shape(a)
    return nbytes(a.x, a.packed, a.residual) + n * k * p * q * a.x.element_size()


@takes_arguments_of(reference)
def flops(a) -> int:
    """Those of the direct sum, two per multiply-add, whatever fewer the algorithm gets by with."""
    n, _, p, q = _shape(a)
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
