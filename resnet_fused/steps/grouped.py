"""Grouped 3x3 convolutions and their gradients by our kernels, and where those are faster than oneDNN's on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import run
from ..backends.place import on_cpu
from ..library import status
from ..ops.contract import is_channels_last
from .layout import Moments
from .spec import Conv

_LEVEL = status().build_info["cpu_level"] if status().cpu.loaded else ""
#: Whether the library is there, and for vectors that all was measured with.
IS_BUILT = _LEVEL in ("avx512", "avx2")
_PEAK = 0.6  # the share of a core's products that ours reach
_WIDE = 64  # channels a group from which on oneDNN's gradient of the weight takes longer for any image
_COLUMNS = 14  # what is written at least, for the weight's gradient, where the weights of a group are many


class Measured(NamedTuple):
    """Where ours are faster, by the vectors of a machine.

    `lanes`: of a vector. `part`: channels of groups of which whole ones fill a vector of 16: by what share of our time
    oneDNN and a read for statistics take longer, forward and for either gradient; where that varies, about the least.
    `most`: channels a group, with more, few outputs meet too many weights. `columns`: what is written at least, where
    the weights of a group are many. `filled`: channels of a group that make a vector, whose weight's gradient oneDNN
    has as fast for small images.
    """

    lanes: int
    part: dict[int, float]
    most: int
    columns: int
    filled: int | None


AVX512 = Measured(16, {4: 1.0, 8: 0.6, 16: 0.3}, 112, _COLUMNS, 16)
AVX2 = Measured(8, {4: 0.9, 8: 0.3, 16: 0.2}, 48, 1, None)
_HERE = AVX2 if _LEVEL == "avx2" else AVX512


def _is_made_for(weight: Tensor, conv: Conv) -> bool:
    """Whether the kernels are there, and have a convolution of this geometry."""
    plain = conv.padding == conv.dilation == (1, 1) and conv.stride in ((1, 1), (2, 2))
    width = weight.shape[1]
    return IS_BUILT and conv.groups > 1 and plain and tuple(weight.shape) == (width * conv.groups, width, 3, 3)


def _serves(like: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    """And on this device and in this dtype."""
    if not _is_made_for(weight, conv) or not on_cpu(like) or backend not in ("auto", "cpu"):
        return False
    return like.dtype == weight.dtype == torch.float32 and is_channels_last(like)


def takes(x: Tensor, weight: Tensor, conv: Conv, backend: str, read: tuple[int, int] | None = None) -> bool:
    """Whether the op `grouped_conv3x3` has this convolution, and is faster. `read`: pixels of the input, to whose
    gradient `x`, that of the output, is taken.

    Measured on two threads of a Zen 5 with AVX-512, quiet by stopping the rest, batch 8, interleaved: oneDNN's time by
    ours (forward / gradient), at ResNeXt's shapes, 32x4d to 64x4d and 32x8d, and RegNet's, over several rounds, of
    which one is recorded (benchmarks/results/epyc-zen5-2core/runs.jsonl:35, of benchmarks/grouped.py):

    ========  =====================  =====================  ======================
    channels  larger than 14x14 out  stride 2               14x14, and 7x7
    ========  =====================  =====================  ======================
    4         2.0 to 2.2 / 2.1       as 8
    8         1.6 to 2.2 / 1.7, 2.0  1.2 to 2.6 / 1.4, 4.8
    16        1.2 to 1.9 / 1.1, 2.0  1.4 to 4.0 / 1.6, 6.9  1.0 to 1.7 / 1.1, 2.2
    32                               0.9 to 1.4 / 2.1, 2.5  1.3 / 1.35; 0.9 / 0.95
    64        1.0 / 1.0              1.0 / 1.3              ; 1.0 / 0.9
    112       1.1 / 1.06
    128       0.86 / 0.88            0.87 / 1.4
    ========  =====================  =====================  ======================

    24 channels, of which two vectors hold one group, took 0.92 to 1.09. The batch statistics come along for nothing.

    Two threads of a Zen 3 with AVX2 alone (benchmarks/results/epyc-avx2-2core/runs.jsonl:23):

    ========  ==========================  ==========================  ======================
    channels  larger than 14x14 out       stride 2                    14x14; 7x7
    ========  ==========================  ==========================  ======================
    4         2.0, 2.1 / 2.1, 2.2
    8         1.3 to 1.7 / 1.4 to 1.7     1.4, 2.0 / 1.4, 2.8
    16        1.0 to 1.2 / 1.2 to 1.5     0.8 to 1.2 / 1.7 to 2.8     1.0, 1.2 / 1.3, 1.8
    24        0.9, 1.3 / 0.95, 1.4
    32                                    1.3 to 1.5 / 1.3 to 1.4     1.1 / 1.1; 1.1, 1.25 / 1.1, 1.2
    56 to 64  0.9 / 0.9                   1.0 / 1.1                   1.0 / 0.96; 1.0 / 1.0
    112, 128  0.8, 1.0 / 0.8, 0.9         0.95 / 1.1
    ========  ==========================  ==========================  ======================
    """
    if not _serves(x, weight, conv, backend):
        return False
    width = weight.shape[1]
    if width in _HERE.part:
        return True
    written = x.shape[3] if conv.stride == (1, 1) else (x.shape[3] - 1) // 2 + 1
    if read is not None:
        if conv.stride == (2, 2):
            return width % _HERE.lanes == 0
        written = read[1]
    return width % _HERE.lanes == 0 and width <= _HERE.most and written >= _HERE.columns


def takes_gradient(grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    """Whether the op `grouped_conv3x3_wgrad` has the weight's gradient, and is faster.

    As :func:`takes`: 3.3 to 6.5 with 4 and 8 channels in groups at 56x56, 1.6 to 2.7 at 28x28; with 16 1.1 to 2.7, 0.9
    to 1.2 at 14x14; with 32 1.1 to 1.8 of stride 2, 1.2 at 14x14, 0.8 to 1.0 at 7x7; 1.1 to 2.1 with 64 to 256. With
    AVX2 1.1 to 3.0 with at most 24; with 32 0.95 to 1.9, 1.0 at 7x7; 1.0 to 1.7 with 56 to 256.
    """
    if not _serves(x, weight, conv, backend) or not is_channels_last(grad) or grad.dtype != x.dtype:
        return False
    width = weight.shape[1]
    if width in _HERE.part:
        return width != _HERE.filled or conv.stride == (2, 2) or grad.shape[3] > _COLUMNS
    large = conv.stride == (2, 2) or width >= _WIDE or grad.shape[3] >= _COLUMNS
    return width % _HERE.lanes == 0 and large


def saved_products(shape: torch.Size, weight: Tensor, conv: Conv) -> float:
    """How many products of a core at its peak a convolution in training takes less than oneDNN's, by `part`.

    `shape`: of what it makes. Tensors are in float32 and on a CPU.
    """
    if not _is_made_for(weight, conv):
        return 0.0
    return 3 * shape[0] * shape[2] * shape[3] * weight.numel() * _HERE.part.get(weight.shape[1], 0.0) / _PEAK


def convolve(x: Tensor, weight: Tensor, conv: Conv, backend: str, statistics: bool) -> tuple[Tensor, Moments | None]:
    """The convolution, and its batch statistics if they are asked for."""
    z, *moments = run("grouped_conv3x3", x, weight, conv.stride[0], False, statistics, backend=backend)
    return z, tuple(moments) if statistics else None


def input_grad(grad: Tensor, weight: Tensor, conv: Conv, read: tuple[int, int], backend: str) -> Tensor:
    """Gradient of what the convolution read, whose pixels are `read`."""
    stride = conv.stride[0]
    more = [size - (made - 1) * stride - 1 for size, made in zip(read, grad.shape[2:], strict=True)]
    return run("grouped_conv3x3", grad, weight, stride, True, False, more, backend=backend)[0]


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str) -> Tensor:
    """The gradient of `weight`."""
    return run("grouped_conv3x3_wgrad", grad, x, weight, conv.stride[0], backend=backend)
