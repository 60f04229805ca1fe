"""The Triton backend on NVIDIA GPUs: products over 1x1 convolutions, passes over activations, and small matrices.

With TRITON_INTERPRET=1, set before Triton is imported, the same kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil

import torch

from ... import ops
from ..declaration import Backend, Kernel, check_complete
from . import limits

MINIMUM = (3, 6)
#: A file that has an op's name is its kernel; the others here are what kernels share.
OPS = tuple(file.name for file in pkgutil.iter_modules(__path__) if file.name in ops.OPS)


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
        refused = {name: Kernel(run, **vars(limits.of(ops.OPS[name])), needs_selfcheck=True) for name in OPS}
        return Backend("triton", ("cuda",), refused, unavailable=reason)
    interpreting = importlib.import_module(".common", __name__).INTERPRETING
    return Backend("triton", ("cuda", "cpu") if interpreting else ("cuda",), dict(kernels()))


BACKEND = check_complete(declare())
