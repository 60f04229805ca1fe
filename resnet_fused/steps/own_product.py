"""1x1 convolutions of a training step by `conv_norm_add_relu`, where that is faster than oneDNN's on a CPU.

Without AVX-512: with it oneDNN's were the faster ones wherever both were measured, or plain products are
(:mod:`.conv`). The op writes a large result to memory that is kept, where a tensor of ATen's is mapped and cleared
anew, and takes a weight as it lies, or transposed once, where oneDNN reorders it at every call.

GFLOP/s of the gradients of ResNet-50's inputs on two cores of a Zen 3 with AVX2 alone, batch 16, interleaved
(benchmarks/pointwise.py, recorded in benchmarks/results/epyc-avx2-2core/runs.jsonl:50):

==========================  ===============  ===============  =================
channels of input, output   a new tensor     added to one     added by a plain
and size                    oneDNN, the op   oneDNN, the op   product
==========================  ===============  ===============  =================
64, 64, 56x56               107, 110         104, 130         126
256, 64, 56x56              65, 156          119, 156         160
64, 256, 56x56              120, 149         120, 170         119
256, 128, 56x56             84, 171          131, 164         166
512, 128, 28x28             129, 136         113, 133         131
128, 512, 28x28             139, 146         131, 145         110
1024, 256, 14x14            139, 143         143, 152         177
256, 1024, 14x14            174, 158         162, 159         176
1024, 512, 14x14            179, 171         163, 168         168
7x7                         158-162,134-139  129, 134-146     170-180
==========================  ===============  ===============  =================

With fewer pixels, and at batch 2 everywhere, nothing adds faster than plain products (:mod:`.conv`).
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
_MOST_CHANNELS, LEAST_PIXELS = 512, 12000  # with which it was the faster one


def pays(x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    """Whether the op is the faster one to write the convolution of `x` to a new tensor, or to add it to one."""
    here = IS_FAST and backend == "auto" and conv == _POINTWISE and tuple(weight.shape[2:]) == (1, 1)
    if not here or not on_cpu(x) or not x.dtype == weight.dtype == torch.float32 or not is_channels_last(x):
        return False
    n, _, h, w = x.shape
    return n * h * w >= LEAST_PIXELS and max(weight.shape[:2]) <= _MOST_CHANNELS


def add_relu(
    x: Tensor, weight: Tensor, shift: Tensor | None, residual: Tensor | None, conv: Conv, relu: bool, backend: str
) -> Tensor:
    """``relu(conv2d(x, weight) + shift + residual)``, channels_last, by the op or as `conv_add_relu`."""
    if pays(x, weight, conv, backend) and (residual is None or _is_like(residual, x, weight)):
        vectors = _vector(shift), None, None, None, None
        return run("conv_norm_add_relu", x, _dense(weight), *vectors, 0.0, residual, relu=relu, backend=backend)
    return run("conv_add_relu", x, weight, shift, residual, *conv.args, relu, backend=backend)


def add_relu_(
    out: Tensor, x: Tensor, weight: Tensor, shift: Tensor | None, conv: Conv, relu: bool, backend: str
) -> None:
    """``out = relu(conv2d(x, weight) + shift + out)``, in place, by the op or as `conv_add_relu_`."""
    if not pays(x, weight, conv, backend) or not _is_like(out, x, weight):
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
