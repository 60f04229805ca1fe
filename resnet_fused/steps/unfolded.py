"""Where a convolution in evaluation is fastest with its weight as its module keeps it: `conv_norm_add_relu` of 1x1.

What is folded into a weight is kept, so the weight it came from is compared at every call, which reads it once more. As
it is, the op packs it on the way, a part at a time into each thread's cache, and needs no bound of its result
(:mod:`..backends.bounds`), since its own ReLU passes NaN.
"""

from __future__ import annotations

from torch import Tensor

from . import winograd
from .conv import HAS_AVX512
from .spec import Conv

#: Whether the op's products are known to be as fast as oneDNN's. Those of 256-bit vectors were not measured.
IS_FAST = winograd.IS_BUILT and HAS_AVX512


def pays(weight: Tensor, conv: Conv) -> bool:
    """Whether the op is expected to be faster than oneDNN's convolution with a packed weight and its comparison.

    It is with every 1x1 without padding and groups. Measured on two threads of a Zen 5 with AVX-512, quiet, from
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
    """
    return tuple(weight.shape[2:]) == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
