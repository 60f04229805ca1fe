"""Convolutions of few input channels, as networks begin with, and where ours are faster than oneDNN's on a CPU."""

from __future__ import annotations

import torch

from ..backends import run
from ..library import status
from ..ops.contract import is_channels_last
from .layout import Moments
from .spec import Conv, Pool

Tensor = torch.Tensor

#: Whether the library is there, and for AVX-512: what has shorter vectors was not measured.
IS_BUILT = status().cpu.loaded and status().build_info["cpu_level"] == "avx512"
CHANNELS = 4  # of the input, at most
_VECTOR = 16  # output channels to a vector


def fits(weight: Tensor, conv: Conv, vectors: int = 2) -> bool:
    """Whether the loops are made for a convolution: few channels in, whole vectors out, a window of more than a pixel.

    TABLE
    """
    outputs, channels, *window = weight.shape
    dense = conv.groups == 1 and tuple(conv.dilation) == (1, 1) and tuple(window) != (1, 1)
    return IS_BUILT and dense and 0 < channels <= CHANNELS and outputs > 0 and outputs % (vectors * _VECTOR) == 0


def pools(weight: Tensor, conv: Conv) -> bool:
    """Whether the op `conv_norm_relu_pool` is made for a convolution."""
    return fits(weight, conv, vectors=1)


def takes(x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    """Whether the ops `stem_conv` and `stem_conv_wgrad` have this convolution, and are faster."""
    if weight.shape[1] > CHANNELS or x.device.type != "cpu" or backend not in ("auto", "cpu"):
        return False
    return x.dtype == weight.dtype == torch.float32 and is_channels_last(x) and fits(weight, conv)


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
