"""Batch norm, ReLU and max pooling of a stem in one pass, so that the activation between them is never written.

Formula::

    a     = relu(scale[c]*z + shift[c])            rounded to z's dtype; NaN passes; a zero may lose its sign
    out   = max_pool2d(a, kernel, stride, padding)  (dilation 1, floor mode: (H + 2*padding - kernel) // stride + 1)
    index = place of the winner in its window, row * kernel_w + column

`z`: ``[N, C, H, W]`` of float32, bfloat16 or float16 (float64 on the CPU), channels_last; `scale`, `shift`: ``[C]``
float32 (float64 for float64). `out`: like z but for its size; `index`: uint8 of the same shape and strides, an eighth
of the int64 positions that stock saves. The winner is stock's: a window is scanned row by row, a later value wins if it
is greater or NaN, padding never wins. At most 255 places in a window.
"""

from __future__ import annotations

import torch

from .contract import Tensor, channels_last, channels_last_strides, define, nbytes, per_channel

SCHEMA = (
    "(Tensor z, Tensor scale, Tensor shift, int[2] kernel=3, int[2] stride=2, int[2] padding=1) "
    "-> (Tensor out, Tensor index)"
)
FORMS = "z:~C scale,shift:C"

MAX_PLACES = 255  # of a window: places are uint8


def pooled_shape(z: Tensor, kernel, stride, padding) -> tuple[int, int, int, int]:
    """Shape of the pooled tensor. Raises RuntimeError for what stock's max_pool2d refuses, in its words."""
    for k, s, p in zip(kernel, stride, padding, strict=True):
        if s == 0:
            raise RuntimeError("stride should not be zero")
        if p < 0:
            raise RuntimeError(f"pad must be non-negative, but got pad: {p}")
        if p > k // 2:
            text = "pad should be at most half of effective kernel size, but got pad"
            raise RuntimeError(f"{text}={p}, kernel_size={k} and dilation=1")
    if min(kernel) < 1:
        raise RuntimeError(f"kernel size should be greater than zero, but got kH: {kernel[0]} kW: {kernel[1]}")
    if min(stride) < 1:
        raise RuntimeError(f"stride should be greater than zero, but got dH: {stride[0]} dW: {stride[1]}")
    if kernel[0] * kernel[1] > MAX_PLACES:
        raise RuntimeError(f"norm_relu_pool: kernel is {list(kernel)}; pass one of at most {MAX_PLACES} places")
    n, c, *size = z.shape
    if c == 0 or 0 in size:
        text = "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got"
        raise RuntimeError(f"{text}:{list(z.shape)}")
    h, w = ((x + 2 * p - k) // s + 1 for x, k, s, p in zip(size, kernel, stride, padding, strict=True))
    if h < 1 or w < 1:
        text = f"Given input size: ({c}x{size[0]}x{size[1]}). Calculated output size: ({c}x{max(h, 0)}x{max(w, 0)})"
        raise RuntimeError(f"{text}. Output size is too small")
    return n, c, h, w


def reference(
    z: Tensor, scale: Tensor, shift: Tensor, kernel=(3, 3), stride=(2, 2), padding=(1, 1)
) -> tuple[Tensor, Tensor]:
    shape = pooled_shape(z, kernel, stride, padding)
    a = torch.relu(z.to(scale.dtype) * per_channel(scale) + per_channel(shift)).to(z.dtype)
    out, position = torch.nn.functional.max_pool2d(a, kernel, stride, padding, return_indices=True)
    top, left = (
        torch.arange(n, device=z.device) * s - p for n, s, p in zip(shape[2:], stride, padding, strict=True)
    )  # of each window
    row, column = position // z.shape[3] - top[:, None], position % z.shape[3] - left
    return channels_last(out), channels_last((row * kernel[1] + column).to(torch.uint8))


def fake(
    z: Tensor, scale: Tensor, shift: Tensor, kernel=(3, 3), stride=(2, 2), padding=(1, 1)
) -> tuple[Tensor, Tensor]:
    shape = pooled_shape(z, kernel, stride, padding)
    strides = channels_last_strides(shape)
    return z.new_empty_strided(shape, strides), z.new_empty_strided(shape, strides, dtype=torch.uint8)


def bytes(z, scale, shift, kernel=(3, 3), stride=(2, 2), padding=(1, 1)):
    """One read of `z`, one write of `out` and `index`."""
    n, c, h, w = pooled_shape(z, kernel, stride, padding)
    return nbytes(z) + n * c * h * w * (z.element_size() + 1)


def flops(z, scale, shift, kernel=(3, 3), stride=(2, 2), padding=(1, 1)):
    """A multiply-add and a clamp for each element of `z`, a comparison for each place of each window."""
    n, c, h, w = pooled_shape(z, kernel, stride, padding)
    return 3 * z.numel() + n * c * h * w * kernel[0] * kernel[1]


OP = define(
    "norm_relu_pool",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
)
