"""What directs the plan: the device that it is for, who listens, who measures; and what is too small to gain.

Process-wide settings of ``with`` blocks; each is a plain attribute, which ``torch.compile`` can guard on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import backends, soundness
from ..backends.place import planned
from ..ops import DATA_DTYPES
from . import devices
from .devices import CPU_CORE, Device

Tensor = torch.Tensor


class _Settings:
    target: Device | None = None
    tuner: Callable | None = None
    fuses_all: bool = False


_settings = _Settings()
_HAS_TRITON = not backends()["triton"].unavailable


@contextlib.contextmanager
def setting(settings: object, name: str, value: object) -> Iterator[None]:
    """An attribute of `settings` as this value within a ``with`` block."""
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


@contextlib.contextmanager
def planning_for(device: Device) -> Iterator[None]:
    """Plan as on `device`, whatever tensors are on, within a ``with`` block: for `explain`, and for tests."""
    with setting(_settings, "target", device), setting(planned, "elsewhere", device is not CPU_CORE):
        yield


def fusing_all() -> contextlib.AbstractContextManager[None]:
    """Fuse what is too small to gain as well, within a ``with`` block: to compare values on small inputs."""
    return setting(_settings, "fuses_all", True)


def fuses_all() -> bool:
    """Whether nothing counts as too small: within :func:`fusing_all`, and in graphs, where Python takes no time."""
    return _settings.fuses_all or torch.compiler.is_compiling()


def is_asked() -> bool:
    """Whether somebody plans for another device now, or listens to what is chosen: then each call is to choose."""
    return _settings.target is not None or bool(observers)


def tuning(tuner: Callable) -> contextlib.AbstractContextManager[None]:
    """Let `tuner`, called with a :class:`Call`, choose a variant of it within a ``with`` block; or None."""
    return setting(_settings, "tuner", tuner)


def tuner() -> Callable | None:
    """Who chooses within :func:`tuning`."""
    return None if torch.compiler.is_compiling() else _settings.tuner


def target() -> Device | None:
    """The device that is planned for in place of that of the tensors, within :func:`planning_for`."""
    return _settings.target


def is_directed() -> bool:
    """Whether a ``with`` block directs or observes the choices, so that each must be made."""
    return _settings.fuses_all or _settings.tuner is not None or is_asked()


def on_gpu(x: Tensor) -> bool:
    """Whether `x` is on a GPU, or planned for as if it were."""
    if _settings.target is not None:
        return _settings.target is not CPU_CORE
    return x.device.type == "cuda"


def place_of(x: Tensor) -> torch.device | None:
    """Where kernels must be sound, see :func:`soundness.lacking`."""
    return x.device if _settings.target is None else None


def lacking(ops: tuple[str, ...], x: Tensor, backend: str = "auto") -> str:
    """The first of `ops` that has no sound kernel of `backend` where `x` is, or is planned for; empty if all have."""
    return soundness.lacking(ops, x.dtype, place_of(x), not isinstance(x, FakeTensor), backend)


def value_device(backend: str, x: Tensor) -> Device | None:
    """The device whose 1x1 kernels would run convolutions on values for `backend`; None: there are none."""
    if x.dtype not in DATA_DTYPES or not on_gpu(x):
        return None
    if _settings.target is not None:
        return _settings.target
    there = _HAS_TRITON and backend in ("auto", "triton")
    there = there or (backend in ("auto", "cuda") and soundness.compiled(VALUE_OPS, x.dtype))
    return devices.of(x.device) if there else None


#: What 1x1 convolutions on values need, forward and backward.
VALUE_OPS = ("conv1x1", "conv1x1_join", "conv1x1_dgrad", "conv1x1_wgrad")


def forced_has(op: str, call) -> bool:
    """Whether the compiled kernels have `op`, where they were forced on `call`; else others may serve."""
    return call.program.backend != "cuda" or soundness.compiled((op,), call.x.dtype)


#: What a Gram join on tensors runs, beside what a written one does.
GRAM_JOIN = ("conv_add_relu", "conv_add_relu_", "bn_stats", "gram", "gram_norm", "gram_grad")


def compiled_alone(backend: str, x: Tensor) -> bool:
    """Whether the compiled kernels run what Triton's would: `backend` forces them, or Triton is not there."""
    asked = backend == "cuda" or (backend == "auto" and not _HAS_TRITON)
    return asked and on_gpu(x) and _settings.target is None


def join_device(backend: str, x: Tensor) -> Device | None:
    """The GPU whose compiled kernels would run Gram joins on tensors for `backend`; None: there are none.

    Where Triton serves, convolutions are on values instead.
    """
    if x.dtype not in DATA_DTYPES or not compiled_alone(backend, x):
        return None
    return None if lacking(GRAM_JOIN, x, backend) else devices.of(x.device)


#: Called with a line of text for every choice, by ``explain``.
observers: list[Callable[[str], object]] = []


def tell(text: str) -> None:
    """Tell all who listen what was chosen."""
    for observer in observers:
        observer(text)


@contextlib.contextmanager
def observing() -> Iterator[list[str]]:
    """The choices made within a ``with`` block, a line of text each."""
    said: list[str] = []
    observers.append(said.append)
    try:
        yield said
    finally:
        observers.pop()
