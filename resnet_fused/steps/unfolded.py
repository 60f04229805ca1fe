"""Where a convolution in evaluation is fastest with its weight as its module keeps it: `conv_norm_add_relu` of 1x1.

What is folded into a weight is kept, so the weight it came from is compared at every call, which reads it once more. As
it is, the op packs it on the way, a part at a time into each thread's cache, and needs no bound of its result
(:mod:`..backends.bounds`), since its own ReLU passes NaN.
"""

from __future__ import annotations

import math

from torch import Tensor

from . import winograd
from .conv import HAS_AVX512
from .spec import Conv

#: Whether the op's products are known to be as fast as oneDNN's; up to how many input channels, from how many pixels.
IS_FAST = winograd.IS_BUILT
_MOST, _MOST_STRIDED, _LEAST_PIXELS = (math.inf, math.inf, 1) if HAS_AVX512 else (512, 256, 1500)


def pays(weight: Tensor, conv: Conv, pixels: int) -> bool:
    """Whether the op is expected to be faster than oneDNN's convolution with a packed weight and its comparison.

    With AVX-512 it is with every 1x1 without padding and groups. Measured on two threads of a Zen 5, quiet, from
    interleaved calls, the op's time by that of oneDNN's packed convolution alone:

    ==============================================  ===========  ============
    convolutions                                    batch 1      batch 8
    ==============================================  ===========  ============
    ResNet-50's, 56x56 and 28x28                    0.79 to 1.0  0.89 to 1.0
    ResNet-50's, 14x14                              1.0 to 1.05  0.98 to 1.04
    ResNet-50's, 7x7, stride 2 to it                1.14 to 1.2  0.92 to 1.0
    8 to 128 channels, 14x14 to 56x56               0.3 to 0.9   0.5 to 1.06
    100 to 300 channels, no multiple of a register  0.6 to 1.05  0.9 to 1.01
    ==============================================  ===========  ============

    Above 1 is what has large weights for its pixels: there the comparison would take a third of the convolution's time.

    Two threads of a Zen 3 with AVX2 alone, quiet by stopping the rest, two rounds:

    ==============================================  ============  ============
    convolutions                                    batch 1       batch 8
    ==============================================  ============  ============
    ResNet-50's, 56x56, and stride 2 from it        0.87 to 1.16  0.72 to 1.05
    ResNet-50's, 28x28, of at most 512 channels     0.97 to 1.21  0.86 to 1.03
    ResNet-50's, 14x14, of 256 channels             1.14 to 1.16  0.91 to 1.03
    from 1024 channels on                           1.09 to 1.32  1.02 to 1.20
    ==============================================  ============  ============

    Since every sum stays in a register there (`multiply_add` in csrc/cpu/simd.h) and products fetch nothing that is
    near (csrc/cpu/product.h), the order is the same, by times that are not recorded; with a stride of 2 oneDNN's are
    the faster ones from 512 channels on.

    `pixels`: of what it makes, in all images.
    """
    most = _MOST if conv.stride == (1, 1) else _MOST_STRIDED
    if weight.shape[1] > most or pixels < _LEAST_PIXELS:
        return False
    return tuple(weight.shape[2:]) == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
