"""The convolutions of a chain and their gradients, each on materialised tensors.

Gradients of 1x1 convolutions are 1x1 convolutions and matrix products themselves, so that they can add to a tensor
that exists already (the identity path's gradient) instead of making one that a later pass must add.
"""

from __future__ import annotations

import torch

from ..backends import run
from .spec import Conv

Tensor = torch.Tensor
aten = torch.ops.aten

# Whose weight gradient is fastest was measured on a CPU without AVX-512 (benchmarks/weight_grad.py); with AVX-512,
# where nobody measured, it is oneDNN's throughout.
_MEASURED = "AVX512" not in torch.backends.cpu.get_cpu_capability()
_MM_PIXELS = 16384  # up to here a 1x1 convolution's is a plain matrix product: 1.1-1.5x faster than oneDNN's
_LARGE_WEIGHT = 1 << 19  # elements; from here on oneDNN takes longer to transpose the weight than an add takes
_OWN_CHANNELS, _OWN_PIXELS = 16, 256  # from here on ours is faster for kernels beyond 1x1: 1.1-1.6x


def channels_last(x: Tensor) -> Tensor:
    """`x` in the layout every kernel of this package wants."""
    return x.contiguous(memory_format=torch.channels_last)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    """ATen's convolution, channels_last in and out."""
    z = aten.convolution(x, weight, bias, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups)
    return channels_last(z)


def strided(x: Tensor, conv: Conv) -> Tensor:
    """The pixels of `x` that a 1x1 convolution of this stride reads."""
    if conv.stride == (1, 1):
        return x
    return channels_last(x[:, :, :: conv.stride[0], :: conv.stride[1]])


def rows(x: Tensor) -> Tensor:
    """A channels_last tensor as the matrix ``[N*H*W, C]`` it is."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def transposed(weight: Tensor) -> Tensor:
    """The weight of the 1x1 convolution that maps gradients back: ``[C, K, 1, 1]``."""
    return weight.transpose(0, 1)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, mask: list[bool]) -> tuple[Tensor | None, ...]:
    return aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, mask
    )


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str) -> Tensor:
    """Gradient of `weight` from the gradient at the convolution's output."""
    own = _own_weight_grad(grad, x, weight, conv, backend)
    return _backward(grad, x, weight, conv, [False, True, False])[1] if own is None else own


def _own_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str) -> Tensor | None:
    """The weight's gradient where something faster than ATen's convolution has it; else None."""
    if grad.device.type == "cpu" and grad.dtype == torch.float32 and _MEASURED and conv.groups == 1:
        pointwise, pixels = conv.is_pointwise(weight), grad[:, 0].numel()
        if pointwise and pixels <= _MM_PIXELS:
            return (rows(grad).T @ rows(strided(x, conv))).view(weight.shape)
        large = weight.shape[1] >= _OWN_CHANNELS and pixels >= _OWN_PIXELS
        if not pointwise and large and backend in ("auto", "cpu"):
            return run("conv_weight_grad", grad, x, weight, *conv.args[:3], backend=backend)
    return None


def input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str, add_to: Tensor | None = None
) -> Tensor:
    """Gradient of `x`. `add_to`: a tensor that is ours alone; the gradient is added to it, in place."""
    if add_to is not None and _adds_in_place(weight, conv):
        run("conv_add_relu_", add_to, grad, transposed(weight), backend=backend)
        return add_to
    grad_x = channels_last(_backward(grad, x, weight, conv, [True, False, False])[0])
    return grad_x if add_to is None else add_to.add_(grad_x)


def _adds_in_place(weight: Tensor, conv: Conv) -> bool:
    return conv.is_pointwise(weight) and conv.stride == (1, 1) and weight.numel() < _LARGE_WEIGHT


def both_grads(
    grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str, add_to: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`weight_grad` and :func:`input_grad`: in one call where both are ATen's, which then reorders once."""
    own = _own_weight_grad(grad, x, weight, conv, backend)
    if own is not None or (add_to is not None and _adds_in_place(weight, conv)):
        own = weight_grad(grad, x, weight, conv, backend) if own is None else own
        return own, input_grad(grad, x, weight, conv, backend, add_to)
    grad_x, grad_weight, _ = _backward(grad, x, weight, conv, [True, True, False])
    grad_x = channels_last(grad_x)
    return grad_weight, grad_x if add_to is None else add_to.add_(grad_x)
