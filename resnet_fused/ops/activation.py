"""The activations behind a batch norm other than ReLU, with their derivatives: by a code, and a slope for leaky ReLU.

=============  ====================================================================================================
`silu`         ``y * sigmoid(y)`` (Elfwing et al. 2017, https://arxiv.org/abs/1702.03118), also called swish
`gelu`         ``y * Phi(y)``, Phi the normal distribution (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415)
`gelu_tanh`    the same with ``Phi(y)`` as ``sigmoid(2 * sqrt(2/pi) * (y + 0.044715 * y**3))``
`leaky_relu`   ``y > 0 ? y : slope * y``, 0 <= slope <= 1
`hardswish`    ``y * clamp(y + 3, 0, 6) / 6`` (Howard et al. 2019, https://arxiv.org/abs/1905.02244)
`relu6`        ``clamp(y, 0, 6)``
=============  ====================================================================================================

NaN stays NaN, and derivatives at kinks are stock's. At NaN stock's of the last two is one thing in a vector and another
in what is left over; here it is always the vector's: NaN, and 0. None is larger than its argument, whose bound holds.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .contract import Tensor

#: Names by code.
NAMES = ("silu", "gelu", "gelu_tanh", "leaky_relu", "hardswish", "relu6")
SILU, GELU, GELU_TANH, LEAKY_RELU, HARDSWISH, RELU6 = range(len(NAMES))
#: Operations an element of the value, and of the derivative; an exponential and a division count 10 each.
_FLOPS = ((22, 26), (50, 54), (28, 40), (2, 2), (6, 4), (2, 3))


def check(act: int) -> None:
    """Raise ValueError for a code that is none."""
    if not 0 <= act < len(NAMES):
        raise ValueError(f"activation {act} is none; pass 0 to {len(NAMES) - 1}: {', '.join(NAMES)}")


def value(y: Tensor, act: int, slope: float = 0.0, inplace: bool = False) -> Tensor:
    """The activation of `y` by stock's own operation; differentiable. `inplace`: in the memory of `y`."""
    check(act)
    if act in (GELU, GELU_TANH):
        approximate = "tanh" if act == GELU_TANH else "none"
        return torch.ops.aten.gelu_(y, approximate=approximate) if inplace else F.gelu(y, approximate=approximate)
    if act == LEAKY_RELU:
        return F.leaky_relu(y, slope, inplace)
    return {SILU: F.silu, HARDSWISH: F.hardswish, RELU6: F.relu6}[act](y, inplace)


def gradient(g: Tensor, y: Tensor, act: int, slope: float = 0.0) -> Tensor:
    """`g` times the derivative at `y`, as stock's backward has it."""
    check(act)
    aten = torch.ops.aten
    if act == SILU:
        return aten.silu_backward(g, y)
    if act in (GELU, GELU_TANH):
        return aten.gelu_backward(g, y, approximate="tanh" if act == GELU_TANH else "none")
    if act == LEAKY_RELU:
        return aten.leaky_relu_backward(g, y, slope, False)
    if act == HARDSWISH:
        inside = torch.where(y >= 3, g, g * (y / 3 + 0.5))
        return torch.where(y <= -3, torch.zeros_like(g), inside)
    return torch.where((y > 0) & (y < 6), g, torch.zeros_like(g))


def flops(act: int, derivative: bool = False) -> int:
    """Operations that an element takes."""
    return _FLOPS[act][derivative]
