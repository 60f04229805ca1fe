"""The ops of csrc/cuda, checks and allocations included, compiled for the CPU and registered once in a process."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import on_cpu
import torch

import build_support
from resnet_fused.backends import Backend, Kernel, backends, cuda, cuda_conv, cuda_gradients, dispatch, place, soundness
from resnet_fused.ops import DATA_DTYPES, OPS, norm_relu_coefficients
from resnet_fused.plan import choose, devices

NAMESPACE = "resnet_fused_cuda_on_cpu"
FILES = {path.stem for path in (on_cpu.SOURCES.parents[1] / "csrc" / "cuda").glob("*.cpp")}
NAMES = sorted(name for name in OPS if name.removesuffix("_") in FILES)


@functools.cache
def _schemas() -> torch.library.Library:
    schemas = torch.library.Library(NAMESPACE, "DEF")  # which lasts as long as this
    for name in NAMES:
        schemas.define(name + OPS[name].schema)
    return schemas


@functools.cache
def registered(*more: str):
    """Their namespace in ``torch.ops``. `more`: flags of the compiler, the same in every call."""
    _schemas()
    _, torch_dir = build_support.find_torch()
    # our stream and guard, not those of torch
    link = ["-Wl,-Bsymbolic", "-Wl,--no-as-needed", f"-L{torch_dir / 'lib'}", "-ltorch"]
    as_built = ["-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags = [*as_built, "-isystem", str(torch_dir / "include")]
    with tempfile.TemporaryDirectory() as directory:
        torch.ops.load_library(on_cpu.compiled("ops.cpp", Path(directory), *flags, *link, *more))
    return getattr(torch.ops, NAMESPACE)


def kernels(*flags: str) -> dict[str, Kernel]:
    """As :mod:`resnet_fused.backends.cuda` declares them, but for the convolutions' reasons."""
    runs = {name: getattr(registered(*flags), name).default for name in NAMES}
    two = runs["norm_add_relu_backward"], runs["bn_coefficients"]
    runs["norm_relu_coefficients"] = norm_relu_coefficients.in_two(*two)
    return {name: Kernel(run, *cuda.accepted(name)) for name, run in runs.items()}


def counted(kernels: dict[str, Kernel], counts: collections.Counter) -> dict[str, Kernel]:
    """The same kernels, of which `counts` tells how often each ran."""

    def counting(name: str, run: Callable) -> Callable:
        def count(*args, **kwargs):
            counts[name] += 1
            return run(*args, **kwargs)

        return count

    return {name: dataclasses.replace(kernel, run=counting(name, kernel.run)) for name, kernel in kernels.items()}


@contextlib.contextmanager
def emulated(*flags: str) -> Iterator[None]:
    """Within it, the backend "cuda" is these kernels on CPU tensors, and plans are made as on a GPU."""
    backend = Backend("cuda", ("cpu",), kernels(*flags))
    with contextlib.ExitStack() as stack:
        patched = [(dispatch, "_backends", {**backends(), "cuda": backend}), (choose, "on_gpu", lambda x: True)]
        for place_of, name, value in [*patched, (place.planned, "elsewhere", True)]:
            stack.enter_context(mock.patch.object(place_of, name, value))
        stack.callback(soundness.forget)
        soundness.forget()
        yield


@contextlib.contextmanager
def training(counts: collections.Counter) -> Iterator[None]:
    """Within it, "cuda" is all that the compiled library declares, planned for as on an H100; `counts` its runs."""
    made = kernels()
    for name in made.keys() & cuda.PRODUCTS.keys():
        made[name] = dataclasses.replace(made[name], unsupported=cuda.PRODUCTS[name]["unsupported"])
    made |= {name: Kernel(getattr(cuda_conv, name), DATA_DTYPES) for name in ("conv_add_relu", "conv_add_relu_")}
    with contextlib.ExitStack() as stack:
        for place_of, name, value in (
            (dispatch, "_backends", {**backends(), "cuda": Backend("cuda", ("cpu",), counted(made, counts))}),
            (cuda_conv, "_op", lambda name: getattr(registered(), name).default),
            (cuda_conv, "_unbuilt", lambda arch: ""),
            (cuda_gradients, "_joins", lambda: True),
            (choose, "on_gpu", lambda x: True),  # no step is the CPU's
            (devices, "of", lambda device: devices.DEVICES["h100"]),
            (place.planned, "elsewhere", True),
        ):
            stack.enter_context(mock.patch.object(place_of, name, value))
        stack.callback(soundness.forget)
        soundness.forget()
        yield
