"""What the compiled gradients of 1x1 convolutions for GPUs take: :mod:`.cuda` declares them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from ..ops import conv1x1_dgrad, conv1x1_wgrad
from ..ops.contract import is_channels_last, takes_arguments_of
from . import cuda_conv

Tensor = torch.Tensor


def _there(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _reasons(g: Tensor, activations: tuple, matrices: tuple, vectors: tuple) -> list[str]:
    found = cuda_conv.device_reasons(g)
    if not all(map(is_channels_last, _there((g, *activations)))):
        found.append("takes channels_last tensors only")
    if any(t.dtype != g.dtype for t in _there((*activations, *matrices))):
        found.append(f"takes activations and weights of one dtype, {g.dtype}")
    if not all(map(is_channels_last, _there(matrices))):
        found.append("takes contiguous weights only")
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in _there(vectors)):
        found.append("takes contiguous float32 vectors only")
    return found


def _sizes(g: Tensor, x: Tensor | None, outputs: int, inputs: int) -> list[str]:
    """What csrc/cuda/conv1x1_gradients.h checks; the op says what is wrong with what is no image."""
    if g.dim() != 4:
        return []
    rows = g.shape[0] * g.shape[2] * g.shape[3]
    sizes = rows * max(outputs, inputs), 0 if x is None else x.numel(), (outputs + 1) * inputs, inputs * inputs
    fits = max(sizes) < cuda_conv.MOST_ELEMENTS
    return [] if fits else ["takes less than 2^31 elements a tensor; pass a smaller batch"]


def _gradient_vectors(a) -> tuple:
    return a.a, a.b, a.d, a.scale, a.shift, a.sample_factor


@takes_arguments_of(conv1x1_dgrad.reference)
def dgrad_reasons(a) -> list[str]:
    """Reasons against `conv1x1_dgrad`."""
    vectors = *_gradient_vectors(a), a.x_scale, a.x_shift, a.x_mean, a.x_rstd, a.constant
    found = _reasons(a.g, (a.z, a.x, a.residual), (a.weight, a.coupling), vectors)
    return found + _sizes(a.g, a.x, a.g.shape[1], conv1x1_dgrad.inputs(a))


@functools.cache
def _joins() -> bool:
    """Whether there is a compiled kernel for what follows of a Gram join."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("resnet_fused::gram_grad", "CUDA")


@takes_arguments_of(conv1x1_wgrad.reference)
def wgrad_reasons(a) -> list[str]:
    """Reasons against `conv1x1_wgrad`."""
    vectors = *_gradient_vectors(a), a.x_scale, a.x_shift
    found = _reasons(a.g, (a.z, a.x), (a.join_weight,), vectors)
    if a.join_weight is not None and not _joins():
        found.append("takes no Gram join, as gram_grad has no compiled kernel")
    return found + _sizes(a.g, a.x, a.g.shape[1], a.x.shape[1])
