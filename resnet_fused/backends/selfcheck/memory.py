"""Verdicts of self-checks on disk, in ``$XDG_CACHE_HOME/resnet_fused/selfcheck`` (default ``~/.cache``), a file each.

A file's name is made from everything that its verdict depends on: op, configuration, device, versions, the kernel's
build and the checks themselves.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
from pathlib import Path

import torch

from .. import disk
from ..declaration import Backend
from .compare import name_of


def cache_dir() -> Path:
    """Where verdicts are kept between processes."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "resnet_fused" / "selfcheck"


@functools.cache
def _checks_identity() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """The architecture a verdict holds for."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def identity(
    backend: Backend, op: str, dtype: torch.dtype, device: torch.device, configuration: str = ""
) -> dict[str, str]:
    """Everything that a verdict depends on; `configuration` as its digest, "" for the verdict on an op as such."""
    return {
        "backend": backend.name,
        "op": op,
        "dtype": name_of(dtype),
        "device": device_name(device),
        "torch": torch.__version__,
        "build": backend.kernels[op].build,
        "checks": _checks_identity(),
        "configuration": configuration,
    }


def _file(key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / f"{key['backend']}-{key['op']}-{key['dtype']}-{digest}.json"


def _read(file: Path) -> tuple[dict[str, str], str] | None:
    """Key and objection in a file; None if it holds none."""
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    fits = isinstance(kept, dict) and isinstance(kept.get("key"), dict) and isinstance(kept.get("objection"), str)
    return (kept["key"], kept["objection"]) if fits else None


def recall(key: dict[str, str]) -> str | None:
    """The objection on disk ("" for a trusted kernel); None if there is none, or none that can be read."""
    kept = _read(_file(key))
    return kept[1] if kept and kept[0] == key else None


def recall_failure(key: dict[str, str]) -> str:
    """An objection on disk to any configuration of the kernel of `key`; "" if there is none."""
    for file in sorted(cache_dir().glob(f"{key['backend']}-{key['op']}-{key['dtype']}-*.json")):
        kept = _read(file)
        if kept and kept[1] and kept[0] | {"configuration": ""} == key | {"configuration": ""}:
            return kept[1]
    return ""


def keep(key: dict[str, str], objection: str) -> None:
    """Write a verdict to disk; a directory that cannot be written only means checking again next time."""
    if key["build"]:  # without it nothing would tell when the kernel has changed
        with contextlib.suppress(OSError):
            disk.write_json(_file(key), {"key": key, "objection": objection})
