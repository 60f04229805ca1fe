"""A 1x1 convolution and its batch norm on values: what it reads is applied on load, what batch norm needs is emitted.

Forward one op reads the value and writes z with its statistics. Backward two ops read the lazy gradient: one for the
weight, one for the input, whose epilogue takes the gradient through the ReLU before it and emits the two sums of
that batch norm, or adds the gradient of the other path into the same tensor. Where the convolution is narrow, one op
does both. Nothing else passes over memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import run, soundness
from .batch_norm import Affine, Coefficients, Statistics, batch_affine, coefficients, running_affine
from .lazy import Lazy, LazyGrad
from .spec import Step, StepGrads, StepTensors

Tensor = torch.Tensor
Value = Tensor | Lazy


class PathGrad(NamedTuple):
    """The gradient of the other path into a chain's input, added where the last gradient is written."""

    grad: Tensor
    mask: Tensor | None = None  # bits by which it is still to be masked
    stride: tuple[int, int] = (1, 1)  # of the pixels that it belongs to
    correction: tuple[Tensor, Tensor] | None = None  # of a Gram join, still to be added: coupling and constant


def serves(step: Step, tensors: StepTensors) -> bool:
    """Whether the step is a plain matrix product over pixels, which the 1x1 ops take."""
    return step.conv.is_pointwise(tensors.weight) and tensors.bias is None


def narrow(step: Step, weight: Tensor, coupled: bool = False) -> bool:
    """Whether one pass over the gradient can make both of the step's. `coupled`: and add another path's correction."""
    return step.conv.stride == (1, 1) and soundness.takes("conv1x1_backward", *weight.shape[:2], coupled)


def parts(value: Value) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A value as the 1x1 ops take it: tensor, scale, shift."""
    return (value.z, value.bn.scale, value.bn.shift) if isinstance(value, Lazy) else (value, None, None)


def materialised(value: Value, backend: str) -> Tensor:
    """A value as a tensor, for a consumer that takes nothing else."""
    return value.materialise(backend) if isinstance(value, Lazy) else value


def forward(value: Value, tensors: StepTensors, step: Step, backend: str) -> tuple[Tensor, Affine, Statistics | None]:
    """``z = conv(value)`` and the affine map that batch norm makes of it."""
    x, scale, shift = parts(value)
    batch_stats, weight = step.norm.batch_stats, tensors.weight.contiguous()
    z, mean, m2 = run("conv1x1", x, weight, scale, shift, step.conv.stride, batch_stats, backend=backend)
    if not batch_stats:
        return z, running_affine(tensors, step.norm, z.dtype, backend), None
    return z, *batch_affine(mean, m2, tensors, step.norm, z, backend)


def weight_grad(grad: LazyGrad, value: Value, step: Step, weight: Tensor, backend: str) -> Tensor:
    """Gradient of the weight, in the dtype of statistics."""
    x, scale, shift = parts(value)
    options = grad.on_load() | {"x_scale": scale, "x_shift": shift, "stride": step.conv.stride}
    product, _ = run("conv1x1_wgrad", grad.g, x, **options, backend=backend)
    return product.view(weight.shape)


def through(grad_x: Tensor, sums: tuple[Tensor, Tensor], value: Lazy, step: Step, backend: str) -> LazyGrad:
    """The gradient before the ReLU and batch norm of `value`, already masked, from its two sums. `step` made it."""
    c = coefficients(value.bn, *sums, value.z, step.norm, backend)
    return LazyGrad(grad_x, value.z, c, value.bn)


def input_grad(
    grad: LazyGrad,
    value: Value,
    step: Step,
    previous: Step | None,
    weight: Tensor | None,
    backend: str,
    other: PathGrad | None = None,
    correction: tuple[Tensor, Tensor] | None = None,
) -> Tensor | LazyGrad:
    """Gradient of a tensor at the pixels that the step read; of a lazy value (that `previous` made) the one before it.

    `weight` None: `grad` is the product with it already. `other`: added, where the step read a tensor. `correction`:
    coupling and constant of a Gram join; that of `other` takes its place.
    """
    x, scale, shift = parts(value)
    options: dict = grad.on_load()
    weight = None if weight is None else weight.contiguous()
    correction = other.correction if correction is None and other is not None else correction
    if correction is not None:
        options |= {"coupling": correction[0], "constant": correction[1]}
    if correction is not None or scale is not None:
        options |= {"x": x, "x_stride": step.conv.stride}
    if isinstance(value, Lazy):
        options |= {"x_scale": scale, "x_shift": shift, "x_mean": value.bn.mean}
        grad_x, *sums = run("conv1x1_dgrad", grad.g, weight, **options, backend=backend)
        if step.conv.stride != (1, 1):  # of the pixels that nobody read it is 0, and adds nothing to the sums
            grad_x = spread(grad_x, x, step.conv.stride, None, backend)
        return through(grad_x, tuple(sums), value, previous, backend)
    if other is not None:
        options |= {"residual": other.grad, "residual_mask": other.mask, "residual_stride": other.stride}
    return run("conv1x1_dgrad", grad.g, weight, **options, backend=backend)[0]


class Both(NamedTuple):
    """What one pass over a lazy gradient makes."""

    value: Tensor | LazyGrad  # of the input, as of :func:`input_grad`
    weight: Tensor  # [K, C]
    sum_dz: Tensor  # [K]


def both_grads(
    grad: LazyGrad,
    value: Value,
    previous: Step | None,
    weight: Tensor,
    backend: str,
    other: PathGrad | None = None,
    weight_scale: Tensor | None = None,
    through_relu: bool = True,
) -> Both:
    """Gradients of the input and of the weight at once, where :func:`narrow` says so.

    `weight_scale`: of the weight for the input's gradient alone. Without `through_relu` the input's stays behind the
    ReLU and batch norm of a lazy value, as a value that `input_grad` goes on from.
    """
    x, scale, shift = parts(value)
    options: dict = grad.on_load() | {"x_scale": scale, "x_shift": shift, "weight_scale": weight_scale}
    options |= {"x_mean": value.bn.mean} if isinstance(value, Lazy) and through_relu else {}
    if other is not None:
        options |= {"residual": other.grad, "residual_mask": other.mask, "residual_stride": other.stride}
        coupling, constant = other.correction or (None, None)
        options |= {"coupling": coupling, "constant": constant}
    grad_x, product, sum_dz, *sums = run("conv1x1_backward", grad.g, weight.contiguous(), x, **options, backend=backend)
    if not through_relu:
        grad_x = LazyGrad(grad_x, None, Coefficients(None, None, None, None, None), grad.bn)
    elif isinstance(value, Lazy):
        grad_x = through(grad_x, tuple(sums), value, previous, backend)
    return Both(grad_x, product, sum_dz)


def add_path(grad_x: Tensor, other: PathGrad | None, backend: str) -> Tensor:
    """Add another path's gradient in a pass of its own, for a gradient that no op of ours wrote."""
    if other is None:
        return grad_x
    grad = other.grad
    if other.mask is not None:
        grad = run("norm_add_relu_backward", grad, mask=other.mask, backend=backend)[0]
    grad_x[:, :, :: other.stride[0], :: other.stride[1]].add_(grad)
    return grad_x


def spread(compact: Tensor, like: Tensor, stride: tuple[int, int], other: PathGrad | None, backend: str) -> Tensor:
    """The gradient of all pixels of `like` from that of those which a strided convolution read, and `other`."""
    full = torch.zeros_like(like, memory_format=torch.channels_last)
    full[:, :, :: stride[0], :: stride[1]] = compact
    return add_path(full, other, backend)


def to_chain_input(grad: Tensor, x: Tensor, step: Step, backend: str, other: PathGrad | None = None) -> Tensor:
    """Gradient of the chain's input from its first convolution's, which :func:`input_grad` could not add `other` to."""
    if step.conv.stride == (1, 1):
        return add_path(grad, other, backend)
    return spread(grad, x, step.conv.stride, other, backend)


def backward(
    grad: LazyGrad,
    value: Value,
    tensors: StepTensors,
    step: Step,
    previous: Step | None,
    backend: str,
    needs: StepGrads,
    needs_value: bool,
    other: PathGrad | None = None,
    one_pass: bool = False,
) -> tuple[Tensor | LazyGrad | None, StepGrads]:
    """Gradients of the step's input (see :func:`input_grad`) and parameters. `one_pass`: where that can be."""
    c, weight = grad.coefficients, tensors.weight
    parameters = c.grad_gamma if needs.gamma else None, c.grad_beta if needs.beta else None
    coupled = other is not None and other.correction is not None
    if one_pass and needs.weight and needs_value and narrow(step, weight, coupled):
        both = both_grads(grad, value, previous, weight, backend, other)
        return both.value, StepGrads(both.weight.view(weight.shape), None, *parameters)
    grads = StepGrads(weight_grad(grad, value, step, weight, backend) if needs.weight else None, None, *parameters)
    if not needs_value:
        return None, grads
    return input_grad(grad, value, step, previous, tensors.weight, backend, other), grads
