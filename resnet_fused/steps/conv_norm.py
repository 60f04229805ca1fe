"""A batch norm of a raw tensor: its statistics forward, and what its gradient is made of backward."""

from __future__ import annotations

import torch

from ..backends import run
from .batch_norm import Affine, Coefficients, Statistics, affine_of, coefficients, parameters, running_affine
from .lazy import LazyGrad
from .spec import Step, StepTensors

Tensor = torch.Tensor


def normalise(z: Tensor, tensors: StepTensors, step: Step, backend: str) -> tuple[Affine, Statistics | None]:
    """Batch norm of `z` as an affine map, from its own statistics or from the running ones."""
    if not step.norm.batch_stats:
        return running_affine(tensors, step.norm, z.dtype, backend), None
    return affine_of(run("bn_stats", z, **parameters(tensors, step.norm), backend=backend), z)


def mask_and_sum(grad: Tensor, z: Tensor, bn: Affine, step: Step, backend: str) -> LazyGrad:
    """The gradient before ``relu(bn(z))``, from the gradient behind it, as a value: two reads, no write."""
    if step.norm.batch_stats:
        arguments = (grad, z, bn.mean, bn.rstd, bn.scale, bn.shift)
        sum_g, b, d, grad_gamma = run("norm_relu_coefficients", *arguments, backend=backend)
        return LazyGrad(grad, z, Coefficients(bn.scale, b, d, grad_gamma, sum_g), bn, relu=True)
    sums = run("norm_add_relu_backward", grad, z, bn.mean, bn.scale, bn.shift, emit_grad=False, backend=backend)
    return LazyGrad(grad, z, coefficients(bn, sums[1], sums[2], z, step.norm, backend), bn, relu=True)
