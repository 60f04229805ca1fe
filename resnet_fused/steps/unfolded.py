"""Where a convolution in evaluation is fastest with its weight as the module keeps it: see `conv_norm_add_relu`."""

from __future__ import annotations

import torch

from . import winograd
from .conv import HAS_AVX512
from .spec import Conv

Tensor = torch.Tensor
#: Whether the products of panels are as fast as oneDNN's: measured with AVX-512 alone.
IS_FAST = winograd.IS_BUILT and HAS_AVX512


def pays(weight: Tensor, conv: Conv, pixels: int) -> bool:
    return tuple(weight.shape[2:]) == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
