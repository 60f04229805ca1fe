"""The CUDA C++ backend: kernels of the second compiled library, on NVIDIA GPUs."""

from __future__ import annotations

import torch

from .. import library
from ..ops import DATA_DTYPES
from .declaration import Backend, Kernel, check_complete

Tensor = torch.Tensor


def layout_reasons(**tensors: Tensor | None) -> list[str]:
    """One reason for every activation that is not channels_last."""
    return [
        f"{name} is not channels_last; pass {name}.contiguous(memory_format=torch.channels_last)"
        for name, t in tensors.items()
        if t is not None and t.dim() == 4 and not t.is_contiguous(memory_format=torch.channels_last)
    ]


def _forward_unsupported(z, scale, shift, residual=None, *_, **__) -> list[str]:
    return layout_reasons(z=z, residual=residual)


def _backward_unsupported(
    grad_out, z=None, scale=None, shift=None, mask=None, residual=None, sample_factor=None, *_, **__
) -> list[str]:
    output = mask if mask is not None and mask.dtype != torch.uint8 else None
    return layout_reasons(grad_out=grad_out, z=z, mask=output, residual=residual)


def _kernels() -> dict[str, Kernel]:
    ops = torch.ops.resnet_fused
    return {
        "norm_add_relu": Kernel(ops.norm_add_relu, DATA_DTYPES, _forward_unsupported, needs_selfcheck=True),
        "norm_add_relu_backward": Kernel(
            ops.norm_add_relu_backward, DATA_DTYPES, _backward_unsupported, needs_selfcheck=True
        ),
    }


_status = library.status()
BACKEND = check_complete(
    Backend(
        name="cuda",
        devices=("cuda",),
        kernels=_kernels() if _status.cuda.loaded else {},
        unavailable=_status.cuda.reason,
    )
)
