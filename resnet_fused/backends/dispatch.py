"""Choose who runs an op: the first backend without a reason against it, or the one the user forced."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from .declaration import Backend

_forced: contextvars.ContextVar[str] = contextvars.ContextVar("resnet_fused_backend", default="auto")
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
    return _forced.get()


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force the backend `name` ("auto", "reference", "cpu", "cuda", "triton") within a ``with`` block.

    A forward run inside the block uses that backend in its backward too. Ops the backend does not have raise
    RuntimeError with the reasons.

    Raises:
        ValueError: `name` is not a backend.
    """
    token = _forced.set(check_name(name))
    try:
        yield
    finally:
        _forced.reset(token)


def choose(op: str, args: tuple, kwargs: dict, name: str = "auto") -> Backend:
    """The backend that runs `op` on these arguments.

    Raises:
        RuntimeError: no backend can; the text lists every backend's reasons.
    """
    candidates = _backends.values() if name == "auto" else [_backends[check_name(name)]]
    refused = []
    for backend in candidates:
        reasons = backend.reasons(op, args, kwargs)
        if not reasons:
            return backend
        refused.append(f"  {backend.name}: {'; '.join(reasons)}")
    raise RuntimeError(f"{op}: no backend can run this case\n" + "\n".join(refused))


def run(op: str, *args, backend: str = "auto", **kwargs):
    """Run the op named `op` on the first backend that can, or on `backend`."""
    chosen = choose(op, args, kwargs, backend)
    return chosen.kernels[op].run(*args, **kwargs)
