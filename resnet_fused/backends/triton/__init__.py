"""The Triton backend: `bn_stats`, `norm_add_relu`, `norm_add_relu_backward` and `lazy_grad_apply` on NVIDIA GPUs.

With TRITON_INTERPRET=1, set before Triton is imported, the same kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib
import importlib.metadata

import torch

from ..declaration import Backend, check_complete

MINIMUM = (3, 6)
OPS = ("bn_stats", "norm_add_relu", "norm_add_relu_backward", "lazy_grad_apply")

#: What is known about these kernels, for `info` and the README's support table.
SUPPORT = "compiled for sm_80, sm_90 and sm_100, values checked in the interpreter, not yet run on a GPU"


def missing_triton() -> str:
    """Why Triton cannot be imported here; empty if it can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed; pip install triton"
    minimum = ".".join(map(str, MINIMUM))
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        return f"Triton {version} is too old; pip install 'triton>={minimum}'"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken install must not take the package down with it
        return f"Triton {version} does not import: {error}"
    return ""


def declare() -> Backend:
    """The backend as this machine can run it."""
    reason = missing_triton()
    if reason:
        return Backend("triton", devices=("cuda",), kernels={}, unavailable=reason)
    kernels = {name: importlib.import_module(f".{name}", __name__).KERNEL for name in OPS}
    from .common import INTERPRETING

    if INTERPRETING:
        return Backend("triton", devices=("cuda", "cpu"), kernels=kernels)
    # device_count asks NVML first: unlike is_available, it leaves a process that forks later able to use its GPUs
    reason = "" if torch.cuda.device_count() else "there is no GPU that torch can use, and TRITON_INTERPRET is not set"
    return Backend("triton", devices=("cuda",), kernels=kernels, unavailable=reason)


BACKEND = check_complete(declare())
