"""Run a case on a backend and compare it with float64: values, layouts, guards, untouched arguments."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from ..backends import Backend
from ..backends.selfcheck.draws import FLANK, Case, place, span
from ..backends.selfcheck.judge import difference, results
from ..ops import OPS, Op, stat_dtype

Tensor = torch.Tensor

#: Rounding noise every result may have, in units of the accumulation type's epsilon, beyond twice the reference's own
#: error. Adding one constant many times in float32 (zeros of a ReLU, shifted) rounds the same way each time. In float64
#: the reference is the yardstick itself, so its own error has to be in here.
NOISE = {torch.float32: 16, torch.float64: 128}

_M_PERTURB = -6  # of glibc's mallopt


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[bool]:
    """Fresh CPU memory holds 0x7F bytes (3e38 as float32 and bfloat16, NaN as float16) within the block.

    Yields whether it does: the switch is glibc's. Kernels that read what nobody wrote then fail on values.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    active = bool(mallopt and mallopt(_M_PERTURB, 0x80))
    try:
        yield active
    finally:
        if active:
            mallopt(_M_PERTURB, 0)


def tensors_of(case: Case) -> list[Tensor]:
    """All tensors among the arguments."""
    values = (*case.args, *case.kwargs.values())
    return [t for value in values for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor)]


def broken_guards(t: Tensor) -> bool:
    """Whether the poison around a tensor of :func:`..backends.selfcheck.draws.place`, or in it, was overwritten."""
    poison = torch.nan if t.is_floating_point() else 255
    buffer = t.as_strided((t.storage_offset() + span(t) + FLANK,), (1,), 0).clone()
    buffer.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(poison)
    return not bool((buffer.isnan() if t.is_floating_point() else buffer == 255).all())


def own_errors(op: Op, case: Case, expected: list[Tensor], dtype: torch.dtype) -> list[float]:
    """Per result: the reference's error in `dtype`; none in float64, which is the yardstick."""
    if dtype == torch.float64:
        return [0.0] * len(expected)
    own = place(case, dtype, torch.device("cpu"))
    plain = results(op.reference(*own.args, **own.kwargs), own.args, op)
    return [difference(r, e) for r, e in zip(plain, expected, strict=True)]


def check(backend: Backend, name: str, case: Case, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Run `case` of the op `name` and raise AssertionError where it breaks the op's contract.

    Returns the backend's reasons if it declares that it cannot run the case; then nothing ran.
    """
    placed = place(case, dtype, device)
    reasons = backend.reasons(name, placed.args, placed.kwargs)
    if reasons:
        return reasons
    op, kernel = OPS[name], backend.kernels[name]
    before = [t.clone() for t in tensors_of(placed)]
    wide = place(placed, torch.float64, torch.device("cpu"))
    expected = [t.clone() for t in results(op.reference(*wide.args, **wide.kwargs), wide.args, op)]
    promised = results(op.fake(*placed.args, **placed.kwargs), placed.args, op)
    got = results(kernel.run(*placed.args, **placed.kwargs), placed.args, op)
    noise = NOISE[stat_dtype(dtype)] * torch.finfo(stat_dtype(dtype)).eps
    own = None  # what the reference errs by itself, which a kernel may twice: asked where noise explains no error
    for index, (g, e, p) in enumerate(zip(got, expected, promised, strict=True)):
        form, wanted = (tuple(g.shape), g.stride(), g.dtype), (tuple(p.shape), p.stride(), p.dtype)
        assert form == wanted, f"result {index} has shape, strides, dtype {form}, promised were {wanted}"
        if g.dim() == 1:  # which of NaN and infinity a sum becomes depends on its order
            g, e = (t.where(t.isfinite(), torch.nan) for t in (g, e))
        error = difference(g, e) if g.numel() else 0.0
        if g.dtype == torch.uint8:
            assert error == 0.0, f"result {index}: mask has wrong bits"
        if not error <= noise and kernel.run is not op.reference:
            own = own or own_errors(op, case, expected, dtype)
            bound = 2 * own[index] + noise
            assert error <= bound, f"result {index}: error {error:.2e} against float64, allowed {bound:.2e}"
    written = {id(placed.args[i]) for i in op.written if i < len(placed.args)}
    for position, (t, old) in enumerate(zip(tensors_of(placed), before, strict=True)):
        assert not broken_guards(t), f"tensor argument {position}: memory around it was written"
        if id(t) not in written:
            assert torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0)), f"tensor argument {position} was changed"
    return []
