"""`norm_relu_coefficients` in Triton: `norm_add_relu_backward`'s first launch, and the coefficients in its second.

Bytes moved per element (16-bit): 2 read for grad, 2 for z, 1/8 for a packed mask or 2 for the forward's output.
Memory-bound; not measured on hardware.
"""

from __future__ import annotations

import torch

from ...ops import norm_relu_coefficients as op
from ...ops.contract import Tensor
from . import bn_coefficients, checks, chunk_sums, common, norm_add_relu_backward


def run(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    sample_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.norm_relu_coefficients`. Raises RuntimeError on arguments that do not fit."""
    name, sign = op.OP.name, (scale, shift) if mask is None else (None, None)
    norm_add_relu_backward.check(name, grad, z, mean, *sign, mask, None, None, sample_factor, True)
    checks.vector(name, "rstd", rstd, grad)
    checks.vector(name, "scale", scale, grad)
    results = tuple(grad.new_empty(grad.shape[1], dtype=torch.float32) for _ in range(4))
    if grad.numel() == 0:
        sum_g, sum_gz, *_ = (t.zero_() for t in results)
        return sum_g, *bn_coefficients.run(sum_g, sum_gz, mean, rstd, scale, z)
    partial = norm_add_relu_backward.start(grad, z, mean, *sign, mask, None, None, sample_factor, True, None, 2)
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    chunk_sums.add_for(chunk_sums.Norm(mean, rstd, scale, pixels), partial, results)
    return results


KERNEL = common.register(op.OP, run)
