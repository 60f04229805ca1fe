"""Multiply by a factor for each sample and channel, add the residual, clamp: the end of a gated block in one pass.

Formula::

    y   = factor[n, c] * z + term[n, c] + residual     (term and residual absent: 0)
    out = y < 0 ? 0 : y  if relu else y                (NaN and -0.0 pass, as in stock)

`z`, `residual`: ``[N, C, H, W]``, one dtype of float32, bfloat16, float16 (float64 on the CPU), channels_last.
`factor`, `term`: ``[N, C]`` float32 (float64 for float64). All arithmetic in that dtype, with one rounding.
`out`: like z.
The factor is what squeeze-and-excitation (Hu et al. 2018, https://arxiv.org/abs/1709.01507) makes of the means over
pixels. Backward, ``factor*g + term`` is the gradient of z: `g` what `gate_add_relu_backward` masked, `term` what came
back through those means. `gate_add_relu_` writes over `z`, for a caller whose own it is; `residual` may then not share
memory with it.
"""

from __future__ import annotations

import torch

from .contract import Tensor, channels_last, channels_last_like, define, define_in_place, nbytes

SCHEMA = "(Tensor z, Tensor factor, Tensor? term=None, Tensor? residual=None, bool relu=True) -> Tensor out"
FORMS = "z,residual:~C factor,term:N*C"


def reference(
    z: Tensor, factor: Tensor, term: Tensor | None = None, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    y = z.to(factor.dtype) * factor[:, :, None, None]
    if term is not None:
        y = y + term[:, :, None, None]
    if residual is not None:
        y = y + residual.to(factor.dtype)
    if relu:
        y = torch.relu(y)
    return channels_last(y.to(z.dtype))


def fake(
    z: Tensor, factor: Tensor, term: Tensor | None = None, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    return channels_last_like(z)


def bytes(z, factor, term=None, residual=None, relu=True):
    """One read of `z` and `residual`, one write of `out`."""
    return 2 * nbytes(z) + nbytes(residual)


def flops(z, factor, term=None, residual=None, relu=True):
    """A product, and one operation for each further term."""
    return z.numel() * (1 + (term is not None) + (residual is not None) + bool(relu))


OP = define(
    "gate_add_relu",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
)

INPLACE_OP = define_in_place(OP)
