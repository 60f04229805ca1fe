"""The reference backend: plain PyTorch on any device and dtype, and the last resort of `auto`."""

from __future__ import annotations

import torch

from ..ops import OPS
from .declaration import Backend, Kernel, check_complete

ANY_DTYPE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _AnyDevice(tuple):
    def __contains__(self, device: object) -> bool:
        return True


BACKEND = check_complete(
    Backend(
        name="reference",
        devices=_AnyDevice(("any device",)),
        kernels={name: Kernel(op.reference, ANY_DTYPE) for name, op in OPS.items()},
    )
)
