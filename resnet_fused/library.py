"""Load the compiled libraries once, and say what is loaded or why not. Nothing here raises on import.

``_C`` defines the compiled ops (``torch.ops.resnet_fused.*``) and carries their CPU kernels; ``_cuda.so`` adds kernels
for CUDA and is loaded only by a CUDA build of torch. Both use the stable ABI of torch, so one build serves every torch
from 2.10 on.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from .ops import OPS

#: Ops that ``_C`` defines; all others are Python over ATen.
COMPILED_OPS = tuple(name for name, op in OPS.items() if op.compiled)
#: Those of which it has CPU kernels.
CPU_OPS = tuple(name for name in COMPILED_OPS if OPS[name].on_cpu)

REBUILD = "run `pip install --no-build-isolation -e .` in the source tree (or without -e to install it)"
_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Library:
    """One compiled library: whether it is loaded, and if not, why."""

    path: str  # file name, "" if there is none
    reason: str = ""  # why it is not loaded; empty: it is

    @property
    def loaded(self) -> bool:
        return not self.reason


@dataclasses.dataclass(frozen=True)
class Status:
    """What :func:`status` found."""

    cpu: Library
    cuda: Library
    build_info: dict[str, str]  # of `_C`; empty if it is not loaded
    torch: str
    triton: str  # "" if it is not installed


@functools.cache
def status() -> Status:
    """Load the libraries on the first call and report on them. Never raises."""
    cpu, info = _load_cpu()
    cuda = _load_cuda(cpu)
    return Status(cpu, cuda, info, torch.__version__, _triton_version())


def _load_cpu() -> tuple[Library, dict[str, str]]:
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is None:
        return Library("", _why_not_found()), {}
    try:
        module = importlib.import_module(f"{__package__}._C")
    except (ImportError, OSError, RuntimeError) as error:
        return Library(spec.origin, _why_not_loaded(error)), {}
    outdated = [name for name in COMPILED_OPS if _compiled_schema(name) != f"resnet_fused::{name}{OPS[name].schema}"]
    if outdated:
        return Library(spec.origin, f"built from other sources: {', '.join(outdated)} differ(s); {REBUILD}"), {}
    for name in COMPILED_OPS:
        torch.library.register_fake(f"resnet_fused::{name}", OPS[name].fake)
    return Library(spec.origin), module.build_info()


def _compiled_schema(name: str) -> str:
    packet = getattr(torch.ops.resnet_fused, name, None)
    return str(packet.default._schema) if packet else "missing"


def _why_not_found() -> str:
    others = sorted(path.name for path in _HERE.glob("_C.*.so"))
    if others:
        return f"built for another Python ({', '.join(others)}); {REBUILD}"
    return f"not built; {REBUILD}"


def _load_cuda(cpu: Library) -> Library:
    path = _HERE / "_cuda.so"
    if torch.version.cuda is None:
        return Library(
            str(path) if path.exists() else "", f"torch {torch.__version__} has no CUDA; install a CUDA build"
        )
    if not cpu.loaded:
        return Library(str(path) if path.exists() else "", "needs _C, which is not loaded")
    if not path.exists():
        return Library("", f"not built: there was no nvcc, or RESNET_FUSED_CUDA=0; put nvcc on PATH and {REBUILD}")
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return Library(str(path), _why_not_loaded(error))
    return Library(str(path))


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _why_not_loaded(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{text.splitlines()[0]}; it needs torch >= 2.10, this is {torch.__version__}; {REBUILD}"
