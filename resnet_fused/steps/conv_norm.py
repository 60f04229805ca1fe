"""The step every chain is made of: a convolution, and the statistics of the batch norm behind it."""

from __future__ import annotations

import torch

from ..backends import run
from .batch_norm import Affine, Coefficients, Statistics, batch_affine, coefficients, running_affine
from .conv import both_grads, conv2d, input_grad, weight_grad
from .lazy import LazyGrad
from .spec import Step, StepGrads, StepTensors

Tensor = torch.Tensor


def normalise(z: Tensor, tensors: StepTensors, step: Step, backend: str) -> tuple[Affine, Statistics | None]:
    """Batch norm of `z` as an affine map, from its own statistics or from the running ones."""
    if not step.norm.batch_stats:
        return running_affine(tensors, step.norm, z.dtype, backend), None
    mean, m2 = run("bn_stats", z, backend=backend)
    return batch_affine(mean, m2, tensors, step.norm, z, backend)


def forward(x: Tensor, tensors: StepTensors, step: Step, backend: str) -> tuple[Tensor, Affine, Statistics | None]:
    """``z = conv(x)`` and the affine map that batch norm makes of it."""
    z = conv2d(x, tensors.weight, tensors.bias, step.conv)
    return z, *normalise(z, tensors, step, backend)


def mask_and_sum(grad: Tensor, z: Tensor, bn: Affine, step: Step, backend: str) -> LazyGrad:
    """The gradient before ``relu(bn(z))``, from the gradient behind it, as a value: two reads, no write."""
    sums = run("norm_add_relu_backward", grad, z, bn.mean, bn.scale, bn.shift, emit_grad=False, backend=backend)
    return LazyGrad(grad, z, coefficients(bn, sums[1], sums[2], z, step.norm, backend), bn, relu=True)


def backward(
    dz: Tensor,
    x: Tensor,
    tensors: StepTensors,
    step: Step,
    c: Coefficients,
    backend: str,
    needs: StepGrads,
    needs_x: bool,
    add_to: Tensor | None = None,
) -> tuple[Tensor | None, StepGrads]:
    """Gradients of the step's input and parameters from the gradient `dz` at the convolution's output.

    `needs`: which gradients are wanted (booleans). `add_to`: see :func:`conv.input_grad`.
    """
    grad_weight = grad_x = None
    if needs.weight and needs_x:
        grad_weight, grad_x = both_grads(dz, x, tensors.weight, step.conv, backend, add_to)
    elif needs.weight:
        grad_weight = weight_grad(dz, x, tensors.weight, step.conv, backend)
    elif needs_x:
        grad_x = input_grad(dz, x, tensors.weight, step.conv, backend, add_to)
    bias = dz.sum((0, 2, 3), dtype=c.a.dtype) if needs.bias else None
    gamma, beta = c.grad_gamma if needs.gamma else None, c.grad_beta if needs.beta else None
    return grad_x, StepGrads(grad_weight, bias, gamma, beta)
