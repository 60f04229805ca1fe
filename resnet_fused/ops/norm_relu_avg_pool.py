"""Batch norm, ReLU and average pooling in one pass, so that the activation between them is never written.

Formula, with |window| the number of places in a window::

    out = sum over the window of relu(scale[c]*x + shift[c]) / |window|     NaN passes; rounded once, at the end

`x`: ``[N, C, H, W]`` of float32, bfloat16 or float16 (float64 on the CPU), channels_last or some channels of such a
tensor (:func:`.contract.is_slice`, on the CPU); `scale`, `shift`: ``[C]`` float32 (float64 for float64), the dtype of
all arithmetic. `out`: like x but for its size, ``(H - kernel) // stride + 1``, channels_last. There is no padding.
"""

from __future__ import annotations

from .contract import Tensor, channels_last, channels_last_strides, define, per_channel

SCHEMA = "(Tensor x, Tensor scale, Tensor shift, int[2] kernel=2, int[2] stride=2) -> Tensor out"
FORMS = "x:~C scale,shift:C"


def pooled_shape(x: Tensor, kernel, stride) -> tuple[int, int, int, int]:
    """Shape of the pooled tensor. Raises RuntimeError for what stock's avg_pool2d refuses, in its words."""
    if min(stride) == 0:
        raise RuntimeError("stride should not be zero")
    if min(kernel) < 1:
        raise RuntimeError(f"kernel size should be greater than zero, but got kH: {kernel[0]} kW: {kernel[1]}")
    if min(stride) < 1:
        raise RuntimeError(f"stride should be greater than zero, but got dH: {stride[0]} dW: {stride[1]}")
    n, c, *size = x.shape
    if c == 0 or 0 in size:
        text = "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got"
        raise RuntimeError(f"{text}:{list(x.shape)}")
    h, w = ((length - k) // s + 1 for length, k, s in zip(size, kernel, stride, strict=True))
    if h < 1 or w < 1:
        text = f"Given input size: ({c}x{size[0]}x{size[1]}). Calculated output size: ({c}x{max(h, 0)}x{max(w, 0)})"
        raise RuntimeError(f"{text}. Output size is too small")
    return n, c, h, w


def reference(x: Tensor, scale: Tensor, shift: Tensor, kernel=(2, 2), stride=(2, 2)) -> Tensor:
    n, c, h, w = pooled_shape(x, kernel, stride)
    y = (x.to(scale.dtype) * per_channel(scale) + per_channel(shift)).relu()
    total = y.new_zeros((n, c, h, w))
    for place in range(kernel[0] * kernel[1]):  # of all windows at once
        top, left = divmod(place, kernel[1])
        total = total + y[:, :, top:, left:][:, :, : stride[0] * h : stride[0], : stride[1] * w : stride[1]]
    return channels_last((total / (kernel[0] * kernel[1])).to(x.dtype))


def fake(x: Tensor, scale: Tensor, shift: Tensor, kernel=(2, 2), stride=(2, 2)) -> Tensor:
    shape = pooled_shape(x, kernel, stride)
    return x.new_empty_strided(shape, channels_last_strides(shape))


def bytes(x, scale, shift, kernel=(2, 2), stride=(2, 2)):
    """One read of what of `x` lies in windows, one write of `out`."""
    n, c, *pooled = pooled_shape(x, kernel, stride)
    rows, columns = ((size - 1) * min(k, s) + k for size, k, s in zip(pooled, kernel, stride, strict=True))
    return n * c * (rows * columns + pooled[0] * pooled[1]) * x.element_size()


def flops(x, scale, shift, kernel=(2, 2), stride=(2, 2)):
    """A multiply-add, a clamp and an addition for each place of each window; a division for each window."""
    n, c, h, w = pooled_shape(x, kernel, stride)
    return n * c * h * w * (4 * kernel[0] * kernel[1] + 1)


OP = define(
    "norm_relu_avg_pool",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
)
