"""The CUDA C++ backend: kernels of the second compiled library, on NVIDIA GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from .. import library
from ..ops import DATA_DTYPES, OPS, bn_coefficients, norm_relu_coefficients
from ..ops.contract import is_channels_last
from . import cuda_conv, cuda_gradients
from .declaration import Backend, Kernel, check_complete
from .selfcheck import conv_cases, conv_gradient_cases, gram_cases


def layout_reasons(*args, **kwargs) -> list[str]:
    """A reason if any activation is not channels_last."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() == 4]
    return [] if all(map(is_channels_last, tensors)) else ["takes channels_last tensors only"]


def vector_reasons(*args, **kwargs) -> list[str]:
    """Reasons against the kernels of vectors alone: those are contiguous, in float32. Activations give their shape."""
    vectors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() == 1]
    fit = all(t.dtype == torch.float32 and t.is_contiguous() for t in vectors)
    return [] if fit else ["takes contiguous float32 vectors only"]


def matrix_reasons(weight: torch.Tensor, *args, **kwargs) -> list[str]:
    """Reasons against the Gram join's small matrices. Of activations only the shape is read."""
    small = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() < 4]
    fit = (weight.dim() != 4 or is_channels_last(weight)) and all(t.is_contiguous() for t in small)
    return [] if fit else ["takes contiguous tensors only"]


def accepted(name: str) -> tuple[tuple[torch.dtype, ...], Callable]:
    """What a compiled kernel declares: dtypes of its first argument, and what may stand against a call."""
    if OPS[name].vectors:
        return (torch.float32,), vector_reasons
    return DATA_DTYPES, matrix_reasons if name in ("gram_norm", "gram_grad") else layout_reasons


def _kernels(status: library.Status) -> dict[str, Kernel]:
    """Of the ops for which the library has registered a kernel."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    build = " ".join(status.build_info.get(fact, "") for fact in ("sources", "nvcc", "cuda_architectures"))
    runs = {
        name: getattr(torch.ops.resnet_fused, name).default
        for name in library.COMPILED_OPS
        if has_kernel(f"resnet_fused::{name}", "CUDA")
    }
    if "norm_add_relu_backward" in runs:
        two = runs["norm_add_relu_backward"], runs.get("bn_coefficients", bn_coefficients.reference)
        runs["norm_relu_coefficients"] = norm_relu_coefficients.in_two(*two)
    made = {name: Kernel(run, *accepted(name), needs_selfcheck=True, build=build) for name, run in runs.items()}
    for name in CONVOLUTIONS if "conv_norm_add_relu" in runs else ():
        run, reasons = runs.get(name) or getattr(cuda_conv, name, None), CONVOLUTION_REASONS[name]
        if run is not None:
            made[name] = Kernel(run, DATA_DTYPES, reasons, needs_selfcheck=True, build=build, mode=cuda_conv.mode)
    for name in [op for op in PRODUCTS if op in runs]:
        settings = {"needs_selfcheck": True, "build": build, "mode": cuda_conv.mode}
        made[name] = Kernel(runs[name], DATA_DTYPES, **PRODUCTS[name], **settings)
    for name in [op for op in GRAM if op in made]:
        made[name] = dataclasses.replace(made[name], **GRAM[name])
    return made


CONVOLUTION_REASONS = {
    "conv_norm_add_relu": cuda_conv.conv_norm_reasons,
    "conv_norm_add_relu_": cuda_conv.conv_norm_reasons_,
    "conv_add_relu": cuda_conv.conv_reasons,
    "conv_add_relu_": cuda_conv.conv_reasons_,
    "conv_chain": cuda_conv.chain_reasons,
}
CONVOLUTIONS = tuple(CONVOLUTION_REASONS)
#: Of training's products on tensor cores: what a plan needs of a backend is in :mod:`...plan.choose`.
PRODUCTS = {
    "conv1x1": {"unsupported": cuda_conv.conv1x1_reasons, "more_cases": conv_cases.conv1x1_tiles},
    "conv1x1_join": {"unsupported": cuda_conv.conv1x1_join_reasons, "more_cases": conv_cases.conv1x1_join_tiles},
    "conv1x1_dgrad": {"unsupported": cuda_gradients.dgrad_reasons, "more_cases": conv_gradient_cases.dgrad_tiles},
    "conv1x1_wgrad": {"unsupported": cuda_gradients.wgrad_reasons, "more_cases": conv_gradient_cases.wgrad_tiles},
    "conv_values": {"unsupported": cuda_conv.conv_values_reasons},
    "conv_join": {"unsupported": cuda_conv.conv_join_reasons},
}
#: Of the Gram join, whose products of float32 are in full whatever is allowed for convolutions.
GRAM = {
    "gram": {"unsupported": cuda_conv.gram_reasons, "more_cases": gram_cases.gram},
    "gram_norm": {"more_cases": gram_cases.gram_norm},
    "gram_grad": {"more_cases": gram_cases.gram_grad},
}
_status = library.status()
#: Ops that a plan for a GPU elsewhere takes to have kernels here: what an install with nvcc builds. Not where this
#: PyTorch could load them and they are not there.
ASSUMED = frozenset(
    (*CONVOLUTIONS, "conv_values", "conv_join") if _status.cuda.loaded or torch.version.cuda is None else ()
)
BACKEND = check_complete(
    Backend(
        name="cuda",
        devices=("cuda",),
        kernels=_kernels(_status) if _status.cuda.loaded else {},
        unavailable=_status.cuda.reason,
    )
)
