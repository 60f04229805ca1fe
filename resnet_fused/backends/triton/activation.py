"""The activations of `norm_act` and their derivatives in float32, by the codes of `ops.activation`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops import activation as codes

_SILU, _GELU, _GELU_TANH = tl.constexpr(codes.SILU), tl.constexpr(codes.GELU), tl.constexpr(codes.GELU_TANH)
_LEAKY, _HARDSWISH = tl.constexpr(codes.LEAKY_RELU), tl.constexpr(codes.HARDSWISH)


@triton.jit
def sigmoid(y):
    e = tl.exp(-tl.abs(y))  # at most 1: nothing overflows
    return tl.where(y < 0, e, 1.0) / (1.0 + e)


@triton.jit
def normal(y):
    """The normal distribution at y."""
    return 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))


@triton.jit
def gelu_gate(y):
    """What multiplies y in the approximate GELU."""
    return sigmoid(1.5957691216057308 * (y + 0.044715 * (y * y * y)))


@triton.jit
def value(y, slope, ACT: tl.constexpr):
    """The activation of y; NaN passes."""
    if ACT == _SILU:
        out = y * sigmoid(y)
    elif ACT == _GELU:
        out = y * normal(y)
    elif ACT == _GELU_TANH:
        out = y * gelu_gate(y)
    elif ACT == _LEAKY:
        out = tl.where(y > 0, y, y * slope)
    elif ACT == _HARDSWISH:
        gate = y + 3.0
        gate = tl.where(gate < 0, 0.0, gate)
        out = y * tl.where(gate > 6.0, 6.0, gate) / 6.0
    else:
        out = tl.where(y < 0, 0.0, y)
        out = tl.where(out > 6.0, 6.0, out)
    return out


@triton.jit
def gradient(g, y, slope, ACT: tl.constexpr):
    """g times the derivative at y; where stock selects, a select."""
    if ACT == _SILU:
        gate = sigmoid(y)
        out = g * (gate * (1.0 + y * (1.0 - gate)))
    elif ACT == _GELU:
        out = g * (normal(y) + y * (0.3989422804014327 * tl.exp(-0.5 * (y * y))))
    elif ACT == _GELU_TANH:
        gate = gelu_gate(y)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * (y * y))
        out = g * (gate + y * (gate * (1.0 - gate)) * inner)
    elif ACT == _LEAKY:
        out = tl.where(y > 0, g, g * slope)
    elif ACT == _HARDSWISH:
        out = tl.where(y >= 3.0, g, g * (y / 3.0 + 0.5))
        out = tl.where(y <= -3.0, 0.0, out)
    else:
        out = tl.where((y > 0) & (y < 6.0), g, 0.0)
    return out
