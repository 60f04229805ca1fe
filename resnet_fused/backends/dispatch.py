"""Choose who runs an op: the first backend without a reason against it, or the one the user forced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..ops import OPS
from . import cards, met, opaque, precision, tf32
from .declaration import Backend, Kernel
from .selfcheck import judge


class _Settings:
    """Process-wide, like ``torch.backends``: a plain attribute is what ``torch.compile`` can guard on."""

    backend = "auto"
    shaped = 0  # how often settings have changed that launches are shaped by


_settings = _Settings()
_backends: dict[str, Backend] = {}
MOST_ANSWERS = 8192  # remembered; more come from ever new sizes of images


class _Answer(NamedTuple):
    """Who runs all calls of one form, and how; it holds while nothing has changed that it was derived from."""

    call: Callable | None  # arguments in one tuple -> results; None: `kernel.run` on them
    backend: Backend
    kernel: Kernel
    mode: str | None
    table: dict[str, Backend]
    doubt: Callable
    changes: int

    def holds(self, op: str, dtype: torch.dtype) -> bool:
        return (
            self.changes == judge.count_of_changes()
            and self.doubt is judge.doubt
            and self.table is _backends
            and self.backend.kernels.get(op) is self.kernel
            and not self.backend.unavailable
            and (self.mode is None or self.mode == self.kernel.mode(dtype))
        )


_answers: dict[Hashable, _Answer] = {}


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
    return _choose(op, args, kwargs, name)[0]


def _choose(op: str, args: tuple, kwargs: dict, name: str) -> tuple[Backend, bool]:
    """The backend of :func:`choose`, and whether that follows from the call's form, no kernel being in doubt."""
    if name != "auto" and OPS[op].small and _backends[check_name(name)].reasons(op, args, kwargs):
        name = "auto"
    candidates = _backends.values() if name == "auto" else [_backends[check_name(name)]]
    refused, doubted = [], False
    for backend in candidates:
        if name == "auto" and (backend.unavailable or op not in backend.kernels):
            continue  # the common case, worth no text
        reasons = backend.reasons(op, args, kwargs)
        if not reasons and backend.kernels[op].needs_selfcheck:
            doubt = judge.doubt(backend, op, args, kwargs)
            reasons = [doubt] if doubt else []
            doubted = doubted or bool(doubt)
        if not reasons:
            return backend, not doubted
        refused.append(f"  {backend.name}: {'; '.join(reasons)}")
    refused = _refusals(op, args, kwargs) if name == "auto" else refused
    raise RuntimeError(f"{op}: no backend can run this case\n" + "\n".join(refused))


def declared(run: Callable) -> tuple[dict[str, Kernel], str, Kernel] | None:
    """The kernel that `run` is, behind all kernels of its backend and its op; None where it is no kernel."""
    for backend in _backends.values():
        for op, kernel in backend.kernels.items():
            if kernel.run is run:
                return backend.kernels, op, kernel
    return None


def _refusals(op: str, args: tuple, kwargs: dict) -> list[str]:
    return [f"  {backend.name}: {'; '.join(backend.reasons(op, args, kwargs))}" for backend in _backends.values()]


def run_now(op: str, *args, backend: str = "auto", **kwargs):
    """Run `op` on the first backend that can, or on `backend`; for real tensors."""
    form = met.form(op, backend, args, kwargs)
    if form is None:
        return choose(op, args, kwargs, backend).kernels[op].run(*args, **kwargs)
    return _run_plain(form, op, args, kwargs, backend)


def _run_plain(form: Hashable, op: str, args: tuple, kwargs: dict, backend: str):
    """Run a call of this form: as the last one was, or as is found out now."""
    answer = _answers.get(form)
    if answer is None or not answer.holds(op, args[0].dtype):
        chosen, lasting = _choose(op, args, kwargs, backend)
        kernel = chosen.kernels[op]
        if not lasting:
            return kernel.run(*args, **kwargs)
        known = (kernel.mode(args[0].dtype) or None, _backends, judge.doubt, judge.count_of_changes())
        if len(_answers) >= MOST_ANSWERS:
            _answers.clear()
        answer = _answers[form] = _Answer(kernel.prepare(args, kwargs), chosen, kernel, *known)
    if answer.call is None:
        return answer.kernel.run(*args, **kwargs)
    return answer.call((*args, *kwargs.values()))


def forget() -> None:
    """Drop what calls were answered: settings have changed that launches are shaped by."""
    _answers.clear()
    _settings.shaped += 1


def state() -> Hashable:
    """All that decides who runs an op, and how, beside the form of its call (:mod:`.met`); for one that is plain."""
    verdicts = judge.count_of_changes(), judge.doubt, id(_backends)
    settings = _settings.shaped, _settings.backend, precision.asked(), cards.assumed(), tf32.allowed()
    return *verdicts, *settings, torch.get_num_threads()


def run(op: str, *args, backend: str = "auto", **kwargs):
    """Run the op named `op` on the first backend that can, or on `backend`; inside a compiled graph, when that runs.

    On fake tensors nobody is chosen: the op stands for itself, and is counted as what it is.
    """
    if not torch.compiler.is_compiling():
        form = met.form(op, backend, args, kwargs)
        if form is not None:
            return _run_plain(form, op, args, kwargs, backend)
        if not isinstance(args[0], FakeTensor):
            return run_now(op, *args, backend=backend, **kwargs)
    return getattr(getattr(torch.ops, opaque.NAMESPACE), op)(*args, backend=backend, **kwargs)


opaque.define_all(run_now)
