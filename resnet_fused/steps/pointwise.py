"""Gradients of a 1x1 convolution on values: what it read is applied on load, what batch norm needs is emitted.

Two passes read the lazy gradient: one for the weight, one for the input, whose epilogue takes the gradient through the
ReLU before it and emits what that batch norm's gradient is made of, or adds the gradient of the other path into the
same tensor; one op makes both, with a launch less than two. Where the convolution is narrow, one pass does. Nothing
else passes over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import run, soundness
from .batch_norm import Coefficients, coefficients
from .lazy import EVERY, Lazy, LazyGrad, Pending, Pixels, Value
from .spec import Conv, Norm


def narrow(conv: Conv, weight: Tensor, coupled: bool = False) -> bool:
    """Whether one pass over the gradient can make both of `conv`. `coupled`: and add another path's correction."""
    return conv.stride == EVERY and soundness.takes("conv1x1_backward", *weight.shape[:2], coupled)


def parts(value: Value) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A value as the 1x1 ops take it: tensor, scale, shift."""
    return (value.z, value.bn.scale, value.bn.shift) if isinstance(value, Lazy) else (value, None, None)


def weight_grad(grad: LazyGrad, value: Value, backend: str, stride: Pixels, **more) -> list[Tensor]:
    """What `conv1x1_wgrad` makes: first the gradient of the weight, ``[K, C]``, and the sum of `grad`."""
    x, scale, shift = parts(value)
    options = grad.on_load() | {"x_scale": scale, "x_shift": shift, "stride": stride} | more
    return run("conv1x1_wgrad", grad.g, x, **options, backend=backend)


def _asked(value: Lazy, norm: Norm) -> dict:
    """What an op is given of the batch norm of `value`, to emit what :func:`_through` wants."""
    return {"x_mean": value.bn.mean, "x_rstd": value.bn.rstd if norm.batch_stats else None}


def _through(grad_x: Tensor, sums: list[Tensor], value: Lazy, norm: Norm, backend: str) -> LazyGrad:
    """The gradient before the ReLU and batch norm of `value`, already masked. `sums`: what the op emitted of it."""
    sum_g, sum_gx, b, d, grad_gamma = sums
    if norm.batch_stats:
        c = Coefficients(value.bn.scale, b, d, grad_gamma, sum_g)
    elif value.bn.rstd is None:
        c = Coefficients(grad_beta=sum_g)
    else:
        c = coefficients(value.bn, sum_g, sum_gx, value.z, norm, backend)
    return LazyGrad(grad_x, value.z, c, value.bn)


def _added(other: Pending | None) -> dict:
    """The gradient of another path, as the ops add it."""
    if other is None:
        return {}
    return {"residual": other.grad, "residual_mask": other.mask, "residual_stride": other.pixels}


def input_grad(
    grad: LazyGrad,
    value: Value,
    previous: Norm | None,
    weight: Tensor | None,
    backend: str,
    stride: Pixels = EVERY,
    other: Pending | None = None,
    correction: tuple[Tensor, Tensor] | None = None,
    weight_grad: bool = False,
) -> tuple[Tensor | LazyGrad, Tensor]:
    """Gradient of a tensor at the pixels that were read; of a lazy value (that `previous` made) the one before it.

    With `weight_grad` also that of the weight, ``[K, C]``, of one value and with a launch less than two.

    `weight` None: `grad` is the product with it already. `other`: added, where a tensor was read. `correction`:
    coupling and constant of a Gram join; that of `other` takes its place.
    """
    x, scale, shift = parts(value)
    options: dict = grad.on_load()
    weight = None if weight is None else weight.contiguous()
    correction = other.correction if correction is None and other is not None else correction
    if correction is not None:
        options |= {"coupling": correction[0], "constant": correction[1]}
    if correction is not None or scale is not None or weight_grad:
        options |= {"x": x, "x_stride": stride}
    if weight_grad:
        options["weight_grad"] = True
    if not isinstance(value, Lazy):
        grad_x, *_, product = run("conv1x1_dgrad", grad.g, weight, **options, **_added(other), backend=backend)
        return grad_x, product
    options |= {"x_scale": scale, "x_shift": shift} | _asked(value, previous)
    grad_x, *sums, product = run("conv1x1_dgrad", grad.g, weight, **options, backend=backend)
    if stride != EVERY:  # of the pixels that nobody read it is 0, and adds nothing to the sums
        compact, (rows, columns) = grad_x, stride
        grad_x = torch.zeros_like(x, memory_format=torch.channels_last)
        grad_x[:, :, ::rows, ::columns] = compact
    return _through(grad_x, sums, value, previous, backend), product


def both_grads(
    grad: LazyGrad,
    value: Value,
    previous: Norm | None,
    weight: Tensor,
    backend: str,
    other: Pending | None = None,
    weight_scale: Tensor | None = None,
    through_relu: bool = True,
    rounded: bool = False,
) -> tuple[Tensor | LazyGrad, Tensor, Tensor]:
    """Gradients of the input, as of :func:`input_grad`, and of the weight, and the sum of `grad`, where narrow.

    See :func:`narrow`. That of the weight, ``[K, C]``, is in its dtype if `rounded`.

    `weight_scale`: of the weight for the input's gradient alone. Without `through_relu` the input's stays behind the
    ReLU and batch norm of a lazy value, as a value that `input_grad` goes on from.
    """
    x, scale, shift = parts(value)
    options: dict = grad.on_load() | {"x_scale": scale, "x_shift": shift, "weight_scale": weight_scale}
    options |= {"rounded": rounded} | (_asked(value, previous) if isinstance(value, Lazy) and through_relu else {})
    if other is not None:
        coupling, constant = other.correction or (None, None)
        options |= _added(other) | {"coupling": coupling, "constant": constant}
    grad_x, product, sum_dz, *sums = run("conv1x1_backward", grad.g, weight.contiguous(), x, **options, backend=backend)
    if not through_relu:
        grad_x = LazyGrad(grad_x, None, Coefficients(), grad.bn)
    elif isinstance(value, Lazy):
        grad_x = _through(grad_x, sums, value, previous, backend)
    return grad_x, product, sum_dz
