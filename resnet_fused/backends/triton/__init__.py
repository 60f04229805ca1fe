"""The Triton backend on NVIDIA GPUs: products over 1x1 convolutions, passes over activations, and small matrices.

With TRITON_INTERPRET=1, set before Triton is imported, the same kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib
import os

import torch

from ...ops import DATA_DTYPES
from ..declaration import Backend, Kernel, check_complete
from . import checks

MINIMUM = (3, 6)
OPS = (
    "bn_stats",
    "bn_affine",
    "bn_coefficients",
    "running_affine",
    "norm_add_relu",
    "norm_add_relu_backward",
    "lazy_grad_apply",
    "norm_relu_pool",
    "norm_relu_pool_backward",
    "norm_relu_pool_apply",
    "gram_norm",
    "gram_grad",
    "gram",
    "conv1x1_dgrad",
    "conv1x1",
    "conv1x1_join",
    "conv1x1_wgrad",
    "conv1x1_backward",
)


def missing_triton() -> str:
    """Why Triton cannot be used here; empty if it can."""
    try:
        version = importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        return "Triton is not installed; pip install triton"
    except Exception as error:  # a broken install must not take the package down with it
        return f"Triton does not import: {error}; reinstall it"
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        return f"Triton {version} is too old; pip install 'triton>={MINIMUM[0]}.{MINIMUM[1]}'"
    return ""


def why_not() -> str:
    """Why the kernels cannot run on this machine; empty if they can. Imports Triton only where it could be used."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return missing_triton()
    # device_count asks NVML first: unlike is_available, it leaves a process that forks later able to use its GPUs
    if torch.cuda.device_count() == 0:
        return "there is no GPU that torch can use, and TRITON_INTERPRET is not set"
    return missing_triton()


def refuse(reason: str, *args, **kwargs):
    raise RuntimeError(f"triton: {reason}")


@functools.cache
def kernels() -> dict[str, Kernel]:
    """The kernels by op, to ask what they would start; also where none can run. Imports Triton."""
    return {name: importlib.import_module(f".{name}", __name__).KERNEL for name in OPS}


def declare() -> Backend:
    """The backend as this machine can run it."""
    reason = why_not()
    if reason:
        run = functools.partial(refuse, reason)
        refused = {name: Kernel(run, DATA_DTYPES, checks.unsupported, needs_selfcheck=True) for name in OPS}
        return Backend("triton", ("cuda",), refused, unavailable=reason)
    interpreting = importlib.import_module(".common", __name__).INTERPRETING
    return Backend("triton", ("cuda", "cpu") if interpreting else ("cuda",), dict(kernels()))


BACKEND = check_complete(declare())
