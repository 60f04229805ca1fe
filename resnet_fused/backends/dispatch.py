"""Choose who runs an op: the first backend without a reason against it, or the one the user forced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..ops import OPS
from . import opaque
from .declaration import Backend
from .selfcheck import judge


class _Settings:
    """Process-wide, like ``torch.backends``: a plain attribute is what ``torch.compile`` can guard on."""

    backend = "auto"


_settings = _Settings()
_backends: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Append a backend; `auto` asks them in the order of registration."""
    _backends[backend.name] = backend


def backends() -> dict[str, Backend]:
    """All backends by name, in the order `auto` asks them."""
    return dict(_backends)


def check_name(name: str) -> str:
    """Return `name` if it is a backend or "auto"; else raise ValueError that lists what is accepted."""
    if name != "auto" and name not in _backends:
        raise ValueError(f"unknown backend {name!r}; pass one of {', '.join(map(repr, ['auto', *_backends]))}")
    return name


def current() -> str:
    """The backend that the innermost :func:`use` asks for; "auto" outside of any."""
    return _settings.backend


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force the backend `name` ("auto", "reference", "cpu", "cuda", "triton") within a ``with`` block.

    It holds for the whole process. A forward run inside the block uses that backend in its backward too. Ops that the
    backend does not have raise RuntimeError with the reasons, but for those on a few numbers per channel.

    Raises:
        ValueError: `name` is not a backend.
    """
    before, _settings.backend = _settings.backend, check_name(name)
    try:
        yield
    finally:
        _settings.backend = before


def objection(name: str, op: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernel of `op` on the backend `name` may not be trusted there; empty if it has proved itself."""
    return judge.objection(_backends[name], op, dtype, device)


def check_all(device: torch.device | str, dtype: torch.dtype | None = None) -> list[judge.Verdict]:
    """Run every kernel of every backend that serves `device` and compare it with float64: the rows of ``verify``.

    `dtype`: of the activations, see :func:`judge.check_all`; None: every one.
    """
    return judge.check_all(device, backends().values(), dtype)


def check_call(op: str, args: tuple, kwargs: dict, device: torch.device) -> list[judge.Verdict]:
    """Check what the first backend that serves a call would start for it: the rows of ``verify --model``.

    `args` may be meta tensors. Empty where that backend's kernels are not judged by configuration.
    """
    for backend in _backends.values():
        kernel = backend.kernels.get(op)
        if kernel is None or backend.unavailable or device.type not in backend.devices:
            continue
        if args[0].dtype in kernel.dtypes and not kernel.unsupported(*args, **kwargs):
            return [] if kernel.launches is None else judge.check_call(backend, op, args, kwargs, device)[1]
    return []


def choose(op: str, args: tuple, kwargs: dict, name: str = "auto") -> Backend:
    """The backend that runs `op` on these arguments.

    Raises:
        RuntimeError: no backend can; the text lists every backend's reasons.
    """
    if name != "auto" and OPS[op].small and _backends[check_name(name)].reasons(op, args, kwargs):
        name = "auto"
    candidates = _backends.values() if name == "auto" else [_backends[check_name(name)]]
    refused = []
    for backend in candidates:
        if name == "auto" and (backend.unavailable or op not in backend.kernels):
            continue  # the common case, worth no text
        reasons = backend.reasons(op, args, kwargs)
        if not reasons and backend.kernels[op].needs_selfcheck:
            doubt = judge.doubt(backend, op, args, kwargs)
            reasons = [doubt] if doubt else []
        if not reasons:
            return backend
        refused.append(f"  {backend.name}: {'; '.join(reasons)}")
    refused = _refusals(op, args, kwargs) if name == "auto" else refused
    raise RuntimeError(f"{op}: no backend can run this case\n" + "\n".join(refused))


def _refusals(op: str, args: tuple, kwargs: dict) -> list[str]:
    return [f"  {backend.name}: {'; '.join(backend.reasons(op, args, kwargs))}" for backend in _backends.values()]


def run_now(op: str, *args, backend: str = "auto", **kwargs):
    """Run `op` on the first backend that can, or on `backend`; for real tensors."""
    chosen = choose(op, args, kwargs, backend)
    return chosen.kernels[op].run(*args, **kwargs)


def run(op: str, *args, backend: str = "auto", **kwargs):
    """Run the op named `op` on the first backend that can, or on `backend`; inside a compiled graph, when that runs.

    On fake tensors nobody is chosen: the op stands for itself, and is counted as what it is.
    """
    if torch.compiler.is_compiling() or isinstance(args[0], FakeTensor):
        return getattr(getattr(torch.ops, opaque.NAMESPACE), op)(*args, backend=backend, **kwargs)
    return run_now(op, *args, backend=backend, **kwargs)


opaque.define_all(run_now)
