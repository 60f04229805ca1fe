"""The convolutions of a chain and their gradients, each on materialised tensors.

Gradients of 1x1 convolutions are 1x1 convolutions and matrix products themselves, so that they can add to a tensor
that exists already (the identity path's gradient) instead of making one that a later pass must add.
"""

from __future__ import annotations

import functools
import pathlib
import re

import torch
from torch import Tensor

from ..backends import run
from ..backends.place import on_cpu
from . import grouped, own_product, stem, winograd, winograd_wgrad
from .layout import Moments
from .lazy import EVERY, Pixels
from .spec import Conv

aten = torch.ops.aten
POINTWISE = Conv()

# Who is fastest on a CPU was measured without and with AVX-512: benchmarks/weight_grad.py, benchmarks/pointwise.py and
# their results; where ours are without it, own_product.py says. With it oneDNN is, but where the weight is large beside
# the pixels, of which oneDNN makes and converts copies, and where a product is added to what is there.
HAS_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
_MM_PIXELS = 16384  # without: up to here a 1x1 weight gradient is a plain matrix product, 1.1-1.5x faster than oneDNN's
# without: ours is faster for 3x3 from so many input and output channels and pixels on, 1.16-1.26x at ResNet-50's stride
# of 2; with 16 channels it reaches 0.7-0.8, and for 5x5 0.65-0.7 (benchmarks/results/epyc-avx2-2core/runs.jsonl:42)
_OWN_CHANNELS, _OWN_OUTPUTS, _OWN_PIXELS, _OWN_TAPS = 64, 32, 256, 9
_FEW, _FEW_OWN = 1, 1  # with: up to so many pixels per channel, 1x1 as plain products, and our weight gradients
_FEW_GRADIENTS = 2  # the same for the gradients of a 1x1
_PARTS_SLOW = 8  # instead of these, an eighth of a pixel, where products of 256-bit vectors, as ours are, are slow
_WIDE_MM = 256  # with: from so many channels on, a gradient is added to that of a wider tensor by a plain product
_LARGE_WEIGHT = 1 << 19  # elements; from here on oneDNN takes longer to transpose the weight than an add takes


@functools.cache
def cpu_info(file: str = "/proc/cpuinfo") -> dict[str, str]:
    """What the kernel tells of the first processor; nothing where there is no /proc."""
    try:
        text = pathlib.Path(file).read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return dict(re.findall(r"^(.*?)\s*:[ \t]*(.*)$", text, re.MULTILINE))


def products_are_slow(cpu: dict[str, str]) -> bool:
    """Whether plain products run at half the rate of oneDNN's convolutions on the processor of this :func:`cpu_info`.

    MKL uses 256-bit vectors on AMD's processors; from Zen 5 on (family 26) their units are 512 bits wide, which oneDNN
    uses. On an EPYC of that family with 2 cores: 195 to 217 GFLOP/s, while convolutions of the same sizes reach 300 to
    470 from 784 pixels on, and 181 at 98. On Zen 4 both reach the same.
    """
    return cpu.get("vendor_id") == "AuthenticAMD" and int(cpu.get("cpu family", 0)) >= 26


SLOW_PRODUCTS = torch.backends.mkl.is_available() and products_are_slow(cpu_info())


def channels_last(x: Tensor) -> Tensor:
    """`x` in the layout every kernel of this package wants."""
    return x.contiguous(memory_format=torch.channels_last)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    backend: str,
    statistics: bool = False,
    precision: str = "default",
) -> tuple[Tensor, Moments | None]:
    """The convolution, channels_last in and out: ATen's, or what is faster.

    And its batch statistics, if they are asked for and its kernel emits them.
    """
    if bias is None and stem.takes(x, weight, conv, backend):
        return stem.convolve(x, weight, conv, backend, statistics)
    if bias is None and winograd.takes(x, weight, conv, backend, precision=precision):
        return winograd.convolve(x, weight, conv, backend, statistics, precision)
    if bias is None and grouped.takes(x, weight, conv, backend):
        return grouped.convolve(x, weight, conv, backend, statistics)
    if bias is None and is_product(_pixels(x, conv), weight, conv, x, _FEW):
        x = strided(x, conv.stride)
        return _image(rows(x) @ weight.flatten(1).T, x), None
    z = aten.convolution(x, weight, bias, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups)
    return channels_last(z), None


def is_product(pixels: int, weight: Tensor, conv: Conv, like: Tensor, few: int = _FEW_GRADIENTS) -> bool:
    """Whether a 1x1 convolution has so few pixels beside its weight that plain products are faster than oneDNN.

    `pixels`: of its output. `like`: any tensor of its data's device and dtype. `few`: pixels per channel.
    """
    here = HAS_AVX512 and on_cpu(like) and like.dtype == torch.float32
    return here and conv.is_pointwise(weight) and _are_few(pixels, weight, few)


def _are_few(pixels: int, weight: Tensor, few: int) -> bool:
    """Whether there are at most `few` pixels per channel. In whole numbers: a graph's symbolic sizes take no others."""
    channels = min(weight.shape[:2])
    return pixels * _PARTS_SLOW <= channels if SLOW_PRODUCTS else pixels <= few * channels


def _are_many(pixels: int, weight: Tensor) -> bool:
    """Whether there are so many pixels and channels, and so few taps, that our weight gradient pays without AVX-512."""
    outputs, inputs, *taps = weight.shape
    few = taps[0] * taps[1] <= _OWN_TAPS
    return few and inputs >= _OWN_CHANNELS and outputs >= _OWN_OUTPUTS and pixels >= _OWN_PIXELS


def _pixels(x: Tensor, conv: Conv) -> int:
    """Pixels that a 1x1 convolution reads."""
    (n, _, h, w), (rows, columns) = x.shape, conv.stride
    return n * -(-h // rows) * -(-w // columns)


def strided(x: Tensor, stride: Pixels) -> Tensor:
    """The pixels of `x` that a 1x1 convolution of this stride reads."""
    return x if stride == EVERY else channels_last(x[:, :, :: stride[0], :: stride[1]])


def rows(x: Tensor) -> Tensor:
    """A channels_last tensor as the matrix ``[N*H*W, C]`` it is."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(matrix: Tensor, like: Tensor) -> Tensor:
    """Inverse of :func:`rows`; `like` has the pixels."""
    n, _, h, w = like.shape
    return matrix.view(n, h, w, matrix.shape[1]).permute(0, 3, 1, 2)


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    backend: str,
    wanted: tuple[bool, bool] = (True, True),
    add_to: Tensor | None = None,
    precision: str = "default",
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `x` and of `weight`, those that are `wanted`, from the one at the convolution's output.

    In one call where both are ATen's, which then reorders once. `add_to`: a tensor that is ours alone; the gradient of
    `x` is added to it, in place.
    """
    grad_weight = _own_weight_grad(grad, x, weight, conv, backend) if wanted[1] else None
    grad_x = _own_input_grad(grad, x, weight, conv, backend, add_to, precision) if wanted[0] else None
    lacking = [wanted[0] and grad_x is None, wanted[1] and grad_weight is None, False]
    if any(lacking):
        settings = [weight.shape[0]], conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups
        made = aten.convolution_backward(grad, x, weight, *settings, lacking)
        grad_x = channels_last(made[0]) if lacking[0] else grad_x
        grad_weight = made[1] if lacking[1] else grad_weight
    if grad_x is not None and add_to is not None and grad_x is not add_to:
        grad_x = add_to.add_(grad_x)
    return grad_x, grad_weight


def _own_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str) -> Tensor | None:
    """The weight's gradient where something faster than ATen's convolution has it; else None."""
    if not on_cpu(grad) or grad.dtype != torch.float32:
        return None
    if conv.groups != 1:
        takes = grouped.takes_gradient(grad, x, weight, conv, backend)
        return grouped.weight_grad(grad, x, weight, conv, backend) if takes else None
    pixels = grad[:, 0].numel()
    if conv.is_pointwise(weight):
        fast = is_product(pixels, weight, conv, x) if HAS_AVX512 else pixels <= _MM_PIXELS
        return (rows(grad).T @ rows(strided(x, conv.stride))).view(weight.shape) if fast else None
    if stem.takes_gradient(x, weight, conv, backend):
        return stem.weight_grad(channels_last(grad), x, weight, conv, backend)
    if winograd_wgrad.takes(grad, x, weight, conv, backend):
        return winograd_wgrad.weight_grad(grad, x, weight, conv, backend)
    fast = _are_few(pixels, weight, _FEW_OWN) if HAS_AVX512 else _are_many(pixels, weight)
    if fast and backend in ("auto", "cpu"):
        return run("conv_weight_grad", grad, x, weight, *conv.args[:3], backend=backend)
    return None


def _own_input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str, add_to: Tensor | None, precision: str
) -> Tensor | None:
    """The input's gradient where something faster than ATen's convolution has it, or adds it to `add_to`; else None."""
    if add_to is not None and _adds_in_place(x, weight, conv, backend):
        if _is_added_product(x, weight, backend):
            add_to.permute(0, 2, 3, 1).view(-1, x.shape[1]).addmm_(rows(grad), weight.flatten(1))
        else:
            own_product.add_relu_(add_to, grad, weight.transpose(0, 1), None, POINTWISE, False, backend)
        return add_to
    if winograd.takes(grad, weight, conv, backend, True, precision):
        return winograd.input_grad(grad, weight, conv, backend, precision)
    if grouped.takes(grad, weight, conv, backend, x.shape[2:]):
        return grouped.input_grad(grad, weight, conv, x.shape[2:], backend)
    if conv.stride == (1, 1) and is_product(grad[:, 0].numel(), weight, conv, x):
        return _image(rows(grad) @ weight.flatten(1), x)
    if own_product.pays(grad, weight.transpose(0, 1), conv, backend):
        return own_product.add_relu(grad, weight.transpose(0, 1), None, None, conv, False, backend)
    return None


def _adds_in_place(x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    if not on_cpu(x) or not conv.is_pointwise(weight) or conv.stride != (1, 1):
        return False  # no kernel of a GPU adds a product to what is there
    return weight.numel() < _LARGE_WEIGHT or _is_added_product(x, weight, backend)


def _is_added_product(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether ``x += grad W`` is fastest as a plain product: with AVX-512 into many channels from fewer."""
    if not on_cpu(x) or x.dtype != torch.float32 or backend not in ("auto", "cpu"):
        return False
    if not HAS_AVX512:
        n, _, h, w = x.shape
        return torch.backends.mkl.is_available() and n * h * w < own_product.LEAST_PIXELS
    return not SLOW_PRODUCTS and weight.shape[1] >= _WIDE_MM and weight.shape[1] > weight.shape[0]
