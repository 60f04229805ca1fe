"""Convolutions of few input channels, as networks begin with, and where ours are faster than oneDNN's on a CPU."""

from __future__ import annotations

import torch

from ..backends import run
from ..backends.place import on_cpu
from ..library import status
from ..ops.contract import is_channels_last
from .layout import Moments
from .spec import Conv, Pool

Tensor = torch.Tensor

_LEVEL = status().build_info["cpu_level"] if status().cpu.loaded else ""
#: Whether the library is there, and for vectors like oneDNN's: what is built without them was not measured.
IS_BUILT = _LEVEL in ("avx512", "avx2")
CHANNELS = 4  # of the input, at most
#: Output channels to a vector, and to what is multiplied at once; and pixels of a window from which on sums are long
#: enough to hide what comes before and after them. oneDNN without AVX-512 takes longer for any window.
_VECTOR, _PANEL, _WINDOW = (16, 32, 25) if _LEVEL == "avx512" else (8, 16, 2)


def _is_made_for(weight: Tensor, conv: Conv, columns: int) -> bool:
    """Whether a convolution has few channels in, whole vectors of `columns` out, and a window of more than a pixel.

    One thread of a Zen 5 with AVX-512, memory kept, two runs: the time of oneDNN's convolution and what follows by
    ours, forward with statistics, the weight's gradient, and with norm, ReLU and pool, packed, in evaluation.

    | images, channels, outputs, window, stride, size | statistics | gradient | pool |
    | --- | --- | --- | --- |
    | 8, 3, 64, 7x7, 2, 224 | 1.22 to 1.24 | 1.4 | 1.3 |
    | 1, 3, 64, 7x7, 2, 224 | 1.02 to 1.04 | 1.3 | |
    | 2, 3, 64, 7x7, 2, 64 | 1.24 | 1.3 | |
    | 8, 1, 64, 7x7, 2, 112 | 1.9 to 2.1 | 3.1 | 1.6 |
    | 8, 4, 64, 7x7, 2, 112 | 1.1 | 1.2 | 1.1 to 1.2 |
    | 8, 2, 32, 5x5, 2, 112 | 1.03 | 1.2 | 1.7 to 1.9 |
    | 8, 1, 32, 3x3, 1, 64 | 5 to 6 | 7 | 2.8 to 3.0 |
    | 8, 4, 64, 4x4, 4, 224 | 1.01 to 1.03, refused | 1.03 | 1.3 to 1.4 |
    | 8, 3, 96, 4x4, 4, 224 | 0.95, refused | 1.1 | 1.3 to 1.4 |
    | 8, 3, 32, 3x3, 2, 224 | 1.1, refused | 1.7 | 1.9 |
    | 8, 3, 64, 3x3, 1, 32 | 1.01, refused | 1.3 | 1.4 |
    | 8, 3, 128, 3x3, 1, 64 | 0.56, refused | 1.4 | 1.3 |
    | 8, 3, 16, 3x3, 2, 224 | 1.0, refused | 0.9, refused | 2.2 to 2.4 |

    Two threads of a Zen 3 with AVX2 alone:

    | images, channels, outputs, window, stride, size | statistics | gradient | pool |
    | --- | --- | --- | --- |
    | 8, 3, 64, 7x7, 2, 224 | 1.4 | 1.7 | 1.45 |
    | 1, 3, 64, 7x7, 2, 224 | 1.4 | 2.0 | 1.5 |
    | 8, 3, 32, 3x3, 2, 224 | 1.15 | 2.2 | 1.55 |
    | 128, 3, 64, 3x3, 1, 32 | 2.0 | 1.3 | |
    | 16, 3, 64, 3x3, 1, 32 | 1.2 | 1.65 | |
    | 128, 3, 16, 3x3, 1, 32 | 1.4 | 1.45 | |
    """
    outputs, channels, *window = weight.shape
    dense = conv.groups == 1 and tuple(conv.dilation) == (1, 1) and tuple(window) != (1, 1)
    return IS_BUILT and dense and 0 < channels <= CHANNELS and outputs > 0 and outputs % columns == 0


def pools(weight: Tensor, conv: Conv) -> bool:
    """Whether the op `conv_norm_relu_pool` is the better choice for a convolution with all that behind it."""
    return _is_made_for(weight, conv, _VECTOR)


def takes(x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    """Whether the op `stem_conv` has this convolution, and is faster."""
    long = weight.shape[2] * weight.shape[3] >= _WINDOW or weight.shape[1] == 1
    return long and takes_gradient(x, weight, conv, backend)


def takes_gradient(x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    """Whether the ops `stem_conv_wgrad` and `stem_pool_wgrad` have the weight's gradient, and are faster."""
    if weight.shape[1] > CHANNELS or not on_cpu(x) or backend not in ("auto", "cpu"):
        return False
    return x.dtype == weight.dtype == torch.float32 and is_channels_last(x) and _is_made_for(weight, conv, _PANEL)


def convolve(x: Tensor, weight: Tensor, conv: Conv, backend: str, statistics: bool) -> tuple[Tensor, Moments | None]:
    """The convolution, and its batch statistics if they are asked for."""
    z, *moments = run("stem_conv", x, weight, conv.stride, conv.padding, statistics, backend=backend)
    return z, tuple(moments) if statistics else None


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str) -> Tensor:
    """The gradient of `weight`."""
    return run("stem_conv_wgrad", grad, x, weight, conv.stride, conv.padding, backend=backend)


def pooled_weight_grad(pooled: tuple, x: Tensor, weight: Tensor, conv: Conv, pool: Pool, backend: str) -> Tensor:
    """The same from the gradient behind norm, ReLU and pool. `pooled`: what `norm_relu_pool_apply` takes first."""
    return run("stem_pool_wgrad", *pooled, x, weight, conv.stride, conv.padding, *pool.args, backend=backend)
