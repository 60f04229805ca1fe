"""What the compiled convolutions for GPUs take: :mod:`.cuda` declares them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from .. import library
from ..ops import conv1x1, conv1x1_join, conv_join, conv_norm_add_relu, conv_values, gram
from ..ops import conv_chain as chain
from ..ops.contract import is_channels_last, takes_arguments_of
from ..ops.conv_add_relu import is_convolution, output_shape
from . import cards, tf32

Tensor = torch.Tensor

#: Elements of a tensor, and padded pixels to a side, from which on the kernel's counters do not suffice.
MOST_ELEMENTS, MOST_PIXELS = 1 << 31, 1 << 15
FULL_FLOAT32 = (
    "takes float32 as TF32 alone, which torch.backends.cudnn.conv.fp32_precision does not allow; "
    "set it to 'tf32', or pass bfloat16 or float16"
)


#: Tiles of 32 inputs by 32 outputs would hold groups block by block and multiply 32 / (channels a group) times as much.
#: Of ResNeXt-50 32x4d (bf16, batch 256, H100) the 3x3 of 128 channels at 56x56, 4 to a group, counted so, in us; each
#: of the next three stages halves all of them::
#:
#:     cuDNN's, if it is as fast as memory, with the norms' passes        361   5 reads and writes of 205 MB
#:     the same in evaluation                                             289   4
#:     tiles, memory                                                      144   2
#:     tiles, tensor cores (``mma.sync``; on an A100 190)                  97   59 GFLOP, 8 times 7.4
#:     tiles, shared memory; with the norm on load                  240, 380
#:     tiles, issue slots; with the norm on load                    220, 480
#:
#: The last two are those of the dense 3x3 of 64 channels there, which multiplies as much (207 and 182 us, see
#: benchmarks/results/epyc-avx2-2core/runs.jsonl:14), with twice the pixels to copy for each output. So in training they
#: lose against memory's bound of what is there; in evaluation they are at 240 to 384 us no sure gain. Products are not
#: what forbids it: a kernel that copies an image's patch once for all nine taps would have to be another.
NO_GROUPS = "takes no groups: in tiles of 32 channels they would be no faster than by cuDNN"


def mode(dtype: torch.dtype) -> str:
    """What a setting of PyTorch's makes of float32 products; nothing for other dtypes."""
    return "tf32" if dtype == torch.float32 and tf32.allowed() else ""


def unbuilt(arch: int, built: str) -> str:
    """Why a library that was built for the architectures `built` has no code for `arch`; empty if it has.

    Binaries run on later minor versions of their major one, PTX on everything later.
    """
    if arch < 80:
        return "needs tensor cores of compute capability 8.0 or later"
    for entry in built.split():
        number = int(entry.partition("+")[0].rstrip("af").replace(".", ""))
        if number <= arch and (number // 10 == arch // 10 or entry.endswith("+PTX")):
            return ""
    has = f"is built for {built or 'no GPU'}, not for {arch // 10}.{arch % 10}"
    return f"{has}; add that to TORCH_CUDA_ARCH_LIST and {library.REBUILD}"


@functools.cache
def _unbuilt(arch: int) -> str:
    return unbuilt(arch, library.status().build_info.get("cuda_architectures", ""))


def limits(x: torch.Size, weight: torch.Size, stride, padding, dilation) -> list[str]:
    """Reasons against sizes, from the shapes of `x` and `weight`. The op tells what is wrong with no convolution."""
    if not is_convolution(x, weight, stride, padding, dilation):
        return []
    if weight[1] != x[1]:
        return [NO_GROUPS] if weight[1] and x[1] % weight[1] == 0 else []
    padded = [size + 2 * p for size, p in zip(x[2:], padding, strict=True)]
    reasons = []
    if any(size >= MOST_PIXELS for size in (*padded, *stride, *dilation)):
        reasons.append(f"takes images, strides and dilations of less than {MOST_PIXELS} pixels to a side, padded")
    out = output_shape(x, weight, stride, padding, dilation)
    if any(math.prod(sizes) >= MOST_ELEMENTS for sizes in (out, (*x[:2], *padded), weight)):
        reasons.append("takes less than 2^31 elements a tensor; pass a smaller batch")
    return reasons


def device_reasons(x: Tensor) -> list[str]:
    """Reasons against tensor cores where `x` is, or with its dtype."""
    lacks = _unbuilt(cards.of(x.device).arch)
    found = [lacks] if lacks else []
    if x.dtype == torch.float32 and not tf32.allowed():
        found.append(FULL_FLOAT32)
    return found


def _reasons(x, weight, vectors, residual, stride, padding, dilation) -> list[str]:
    found = device_reasons(x)
    if not all(is_channels_last(t) for t in (x, residual) if t is not None):
        found.append("takes channels_last tensors only")
    if weight.dtype != x.dtype:
        found.append(f"takes weight and x of one dtype, not {weight.dtype} and {x.dtype}")
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in vectors if t is not None):
        found.append("takes contiguous float32 vectors only")
    return found + limits(x.shape, weight.shape, stride, padding, dilation)


@takes_arguments_of(conv_norm_add_relu.reference)
def conv_norm_reasons(a) -> list[str]:
    """Reasons against `conv_norm_add_relu`."""
    vectors = a.bias, a.mean, a.var, a.gamma, a.beta
    found = _reasons(a.x, a.weight, vectors, a.residual, a.stride, a.padding, a.dilation)
    return found if _is_dense(a.weight) else [*found, "takes a dense weight only"]


def conv_norm_reasons_(out, *args, adds=False, **kwargs) -> list[str]:
    """Reasons against `conv_norm_add_relu_`."""
    *args, _ = args if len(args) == 13 else (*args, adds)
    found, x = conv_norm_reasons(*args, **kwargs), args[0]
    fits = is_channels_last(out) and out.dtype == x.dtype
    return found if fits else [*found, "takes a channels_last tensor of x's dtype for the result only"]


@takes_arguments_of(chain.reference)
def chain_reasons(a) -> list[str]:
    """Reasons against `conv_chain`: those against any of its convolutions."""
    with cards.assuming(cards.of(a.x.device)):  # what is between them is on the meta device
        each = chain.convolutions(a.x, a.residual, a.tensors, a.steps, a.eps)
        return [*dict.fromkeys(reason for given in each for reason in conv_norm_reasons(*given))]


def conv_reasons(
    x, weight, shift=None, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False
) -> list[str]:
    """Reasons against `conv_add_relu`."""
    if groups != 1:
        return [NO_GROUPS]
    return _reasons(x, weight, (shift,), residual, stride, padding, dilation)


def conv_reasons_(residual, x, weight, shift=None, *args, **kwargs) -> list[str]:
    """Reasons against `conv_add_relu_`."""
    return conv_reasons(x, weight, shift, residual, *args, **kwargs)


@takes_arguments_of(conv1x1.reference)
def conv1x1_reasons(a) -> list[str]:
    """Reasons against `conv1x1`."""
    found = _reasons(a.x, a.weight, (a.x_scale, a.x_shift), None, a.stride, (0, 0), (1, 1))
    return found if is_channels_last(a.weight) else [*found, "takes a contiguous weight only"]


@takes_arguments_of(conv_values.reference)
def conv_values_reasons(a) -> list[str]:
    """Reasons against `conv_values`."""
    found = _reasons(a.x, a.weight, (a.x_scale, a.x_shift), None, a.stride, a.padding, a.dilation)
    return found if _is_dense(a.weight) else [*found, "takes a dense weight only"]


@takes_arguments_of(conv_join.reference)
def conv_join_reasons(a) -> list[str]:
    """Reasons against `conv_join`."""
    vectors = a.scale, a.shift, a.sample_factor
    found = _reasons(a.x, a.weight, vectors, a.residual, a.stride, a.padding, a.dilation)
    if a.residual is not None and a.residual.dtype != a.x.dtype:
        found.append("takes residual and x of one dtype")
    return found if _is_dense(a.weight) else [*found, "takes a dense weight only"]


@takes_arguments_of(conv1x1_join.reference)
def conv1x1_join_reasons(a) -> list[str]:
    """Reasons against `conv1x1_join`."""
    vectors = a.scale, a.shift, a.x_scale, a.x_shift, a.residual_scale, a.residual_shift, a.sample_factor
    found = _reasons(a.x, a.weight, vectors, a.residual, (1, 1), (0, 0), (1, 1))
    if a.x2 is not None and a.weight2 is not None:
        second = _reasons(a.x2, a.weight2, (a.scale2, a.shift2), None, a.stride2, (0, 0), (1, 1))
        found += [reason for reason in second if reason not in found]
    if any(t is not None and t.dtype != a.x.dtype for t in (a.residual, a.x2)):
        found.append("takes residual, x2 and x of one dtype")
    dense = all(is_channels_last(t) for t in (a.weight, a.weight2) if t is not None)
    return found if dense else [*found, "takes contiguous weights only"]


@takes_arguments_of(gram.reference)
def gram_reasons(given) -> list[str]:
    """Reasons against `gram`, which multiplies float32 in full."""
    a, lacks = given.a, _unbuilt(cards.of(given.a.device).arch)
    found = [lacks] if lacks else []
    if not is_channels_last(a):
        found.append("takes channels_last tensors only")
    vectors = (given.centre, given.scale, given.shift)
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in vectors if t is not None):
        found.append("takes contiguous float32 vectors only")
    if max(a.numel(), a.shape[1] ** 2) >= MOST_ELEMENTS:
        found.append("takes less than 2^31 elements a tensor; pass a smaller batch")
    return found


def _is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or is_channels_last(weight)


def _dense(weight: Tensor) -> Tensor:
    """`weight`, or a copy of one that is neither contiguous nor channels_last."""
    return weight if _is_dense(weight) else weight.contiguous(memory_format=torch.channels_last)


def _op(name: str) -> Callable:
    return getattr(torch.ops.resnet_fused, name).default


def conv_add_relu(
    x, weight, shift=None, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False
) -> Tensor:
    """See ``ops.conv_add_relu``: the convolution that has a batch norm too, without one."""
    return _op("conv_norm_add_relu")(
        x, _dense(weight), shift, *[None] * 4, 1.0, residual, stride, padding, dilation, relu
    )


def conv_add_relu_(
    residual, x, weight, shift=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False
) -> None:
    """See ``ops.conv_add_relu``: the sum lands in `residual`."""
    arguments = residual, x, _dense(weight), shift, *[None] * 4, 1.0, None, stride, padding, dilation, relu, True
    _op("conv_norm_add_relu_")(*arguments)
