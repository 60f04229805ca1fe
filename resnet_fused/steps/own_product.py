"""1x1 convolutions of a training step by `conv_norm_add_relu`, where that is faster than oneDNN's on a CPU.

Without AVX-512: with it oneDNN's were the faster ones wherever both were measured, or plain products are
(:mod:`.conv`). The op writes a large result to memory that is kept, where a tensor of ATen's is mapped and cleared
anew, and takes a weight as it lies, or transposed once, where oneDNN reorders it at every call.

Measured on two threads of a Zen 3 with AVX2 alone, batch 16, the op's time by oneDNN's, from interleaved calls:

===================================  =============  ==============
gradients of ResNet-50's inputs      a new tensor   added to one
===================================  =============  ==============
56x56                                0.34 to 0.87   0.75 to 0.86
28x28                                0.68 to 1.01   0.86 to 0.92
14x14, of 256 and 512 channels       1.05 to 1.10   0.95 to 0.99
14x14 of 1024, 7x7                   1.08 to 1.20   0.87 to 1.05
===================================  =============  ==============

At batch 2 a new one takes 0.84 to 0.95 at 56x56, 1.0 to 1.04 at 28x28 and 1.2 to 1.8 below, one that is added 0.76 to
0.92 everywhere.
"""

from __future__ import annotations

import math

import torch

from ..backends import bounds, run
from ..backends.place import on_cpu
from ..ops.contract import is_channels_last
from . import winograd
from .spec import Conv

Tensor = torch.Tensor

#: Whether the op's products were measured against oneDNN's, and found the faster ones.
IS_FAST = winograd.IS_BUILT and "AVX512" not in torch.backends.cpu.get_cpu_capability()
_POINTWISE = Conv()
_MOST = 512  # channels that are read, where pixels are many; rows of more lie a page apart
_LEAST, _FEW = 6000, 1024  # pixels from which a new tensor pays, and up to which adding does with any channels


def makes(x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    """Whether the op is the faster one to write the convolution of `x` to a new tensor."""
    return _takes(x, weight, conv, backend) and _pixels(x) >= _LEAST and max(weight.shape[:2]) <= _MOST


def adds(x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    """Whether the op is the faster one to add the convolution of `x` to a tensor that is there."""
    return _takes(x, weight, conv, backend) and (weight.shape[1] <= _MOST or _pixels(x) <= _FEW)


def _takes(x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    here = IS_FAST and backend == "auto" and conv == _POINTWISE and tuple(weight.shape[2:]) == (1, 1)
    return here and on_cpu(x) and x.dtype == weight.dtype == torch.float32 and is_channels_last(x)


def _pixels(x: Tensor) -> int:
    n, _, h, w = x.shape
    return n * h * w


def add_relu(
    x: Tensor, weight: Tensor, shift: Tensor | None, residual: Tensor | None, conv: Conv, relu: bool, backend: str
) -> Tensor:
    """``relu(conv2d(x, weight) + shift + residual)``, channels_last, by the op or as `conv_add_relu`."""
    if makes(x, weight, conv, backend) and (residual is None or _is_like(residual, x, weight)):
        vectors = _vector(shift), None, None, None, None
        return run("conv_norm_add_relu", x, _dense(weight), *vectors, 0.0, residual, relu=relu, backend=backend)
    return run("conv_add_relu", x, weight, shift, residual, *conv.args, relu, backend=backend)


def add_relu_(
    out: Tensor, x: Tensor, weight: Tensor, shift: Tensor | None, conv: Conv, relu: bool, backend: str
) -> None:
    """``out = relu(conv2d(x, weight) + shift + out)``, in place, by the op or as `conv_add_relu_`."""
    if not adds(x, weight, conv, backend) or not _is_like(out, x, weight):
        run("conv_add_relu_", out, x, weight, shift, *conv.args, relu, backend=backend)
        return
    vectors = _vector(shift), None, None, None, None
    run("conv_norm_add_relu_", out, x, _dense(weight), *vectors, 0.0, relu=relu, adds=True, backend=backend)
    bounds.remember(out, math.inf)  # what was known is of what it held


def _is_like(out: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether `out` is a tensor of the result's shape and dtype in its layout."""
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return tuple(out.shape) == shape and out.dtype == torch.float32 and is_channels_last(out)


def _vector(shift: Tensor | None) -> Tensor | None:
    return None if shift is None else shift.to(torch.float32)


def _dense(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)
