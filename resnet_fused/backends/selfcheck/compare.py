"""Run one case of a kernel and compare it with the float64 reference."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import torch

from ...ops import OPS, Op, stat_dtype
from .. import cards
from ..declaration import Backend
from . import draws
from .draws import Case

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one case of one kernel: a row of ``verify``."""

    op: str
    backend: str
    dtype: str
    case: str
    status: str  # "passed", "failed" or "skipped"
    error: float = 0.0  # largest difference from float64, relative to the largest value of that result
    allowed: float = 0.0
    note: str = ""  # why it failed without an error figure, or was skipped

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __str__(self) -> str:
        figures = self.note or f"error {self.error:.1e}, allowed {self.allowed:.1e}"
        return f"{self.backend} {self.op} ({self.dtype}), case {self.case!r}: {figures}"


def name_of(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


#: Results that follow from sums of rounded values by products and a difference: of so many errors of such a sum.
_FROM_SUMS = {"b": 4, "d": 4, "grad_gamma": 4}


def allowed_error(op: str, dtype: torch.dtype, result: Tensor, name: str = "") -> float:
    """The op's units in the last place for a rounded result, one for sums of rounded values; and noise in all sums.

    `name`: of the result.
    """
    if dtype == torch.float64:
        return 1e-10  # no reference is more exact; what a float32 shortcut would cost is far above
    noise = 64 * torch.finfo(stat_dtype(dtype)).eps
    if result.dtype != dtype or (result.dim() != 4 and dtype.itemsize > 2):  # of 16 bits, a weight's gradient too
        return noise + (torch.finfo(dtype).eps * _FROM_SUMS.get(name, 1) if OPS[op].sums_of_rounded else 0.0)
    return noise + OPS[op].ulps * torch.finfo(dtype).eps


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where NaN or infinity stand in different places."""
    got, expected = got.detach().cpu().double(), expected.double()
    finite = expected.isfinite()
    if got.shape == expected.shape and expected.numel() and finite.all():  # nearly always; choosing elements is slow
        error = (got - expected).abs_().max().item()
        return error / (expected.abs().max().item() or 1.0) if math.isfinite(error) else float("inf")
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got.isnan(), expected.isnan()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = expected[finite].abs().max().item() or 1.0
    return (got[finite] - expected[finite]).abs().max().item() / scale


def own_error(op: str, case: Case, dtype: torch.dtype, device: torch.device, index: int, expected: Tensor) -> float:
    """Of PyTorch in `dtype`, whose convolutions are less exact on CPUs without products of 16 bits; 0 if not finite."""
    placed = draws.place(case, dtype, device)
    returned = OPS[op].reference(*placed.args, **placed.kwargs)
    own = difference(results(returned, (*placed.args, *placed.kwargs.values()), OPS[op])[index], expected)
    return own if own < float("inf") else 0.0


def results(returned, args: tuple, op: Op) -> list[Tensor]:
    """What an op produced: what an in-place op left in the arguments that it writes, and what it returned.

    `args`: in the order of its schema, as far as it writes them.
    """
    written = [args[i] for i in op.written if i < len(args) and args[i] is not None]
    if returned is None:
        return written
    return [*written, *([returned] if isinstance(returned, torch.Tensor) else returned)]


def check_case(backend: Backend, op: str, case: Case, dtype: torch.dtype, device: torch.device) -> Verdict:
    """Run one case and compare values, shapes, dtypes and strides. Raises whatever the kernel raises."""
    placed = draws.place(case, dtype, device)
    row = functools.partial(Verdict, op, backend.name, name_of(dtype), case.name)
    reasons = backend.reasons(op, placed.args, placed.kwargs)
    if reasons:
        return row("skipped", note="; ".join(reasons))
    wide = draws.place(placed, torch.float64, torch.device("cpu"))
    given = (*placed.args, *placed.kwargs.values())
    promised = results(OPS[op].fake(*placed.args, **placed.kwargs), given, OPS[op])
    with cards.assuming(case.card):
        got = results(
            backend.kernels[op].run(*placed.args, **placed.kwargs), (*placed.args, *placed.kwargs.values()), OPS[op]
        )
    expected = results(OPS[op].reference(*wide.args, **wide.kwargs), (*wide.args, *wide.kwargs.values()), OPS[op])
    measured = [(0.0, 0.0)]
    for index, (g, e, p) in enumerate(zip(got, expected, promised, strict=True)):
        form, wanted = (tuple(g.shape), g.stride(), g.dtype), (tuple(p.shape), p.stride(), p.dtype)
        if form != wanted:
            return row("failed", note=f"result {index} has shape, strides, dtype {form} instead of {wanted}")
        if g.numel() == 0:
            continue
        name = OPS[op].results[index] if index < len(OPS[op].results) else ""
        error, bound = difference(g, e), 0.0 if g.dtype == torch.uint8 else allowed_error(op, dtype, g, name)
        if device.type == "cpu" and dtype.itemsize == 2 and 0.0 < bound < error:
            bound = max(bound, 2 * own_error(op, case, dtype, device, index, e))
        if not error <= bound:
            return row("failed", error, bound, "" if bound else f"result {index} (mask) has wrong bits")
        measured.append((error, bound))
    return row("passed", *max(measured, key=lambda pair: (pair[0] / (pair[1] or 1.0), pair[1])))


def check(
    backend: Backend, op: str, dtype: torch.dtype, device: torch.device, cases: Callable[[], Iterable[Case]]
) -> list[Verdict]:
    """Make and run the cases of one kernel in a clean thread; an exception is a failed case."""
    row = functools.partial(Verdict, op, backend.name, name_of(dtype))

    def one(case: Case) -> Verdict:
        try:
            return check_case(backend, op, case, dtype, device)
        except Exception as error:
            return row(case.name, "failed", note=raised(error))

    def work() -> list[Verdict]:
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here, torch.no_grad():
            try:
                made = cases()
            except Exception as error:
                return [row("cases of a call", "failed", note=raised(error))]
            return [one(case) for case in made]

    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="resnet_fused-selfcheck") as pool:
        return pool.submit(work).result()


def raised(error: Exception) -> str:
    """How a row tells of an exception."""
    return f"raised {type(error).__name__}: {str(error).strip()[:200]}"
