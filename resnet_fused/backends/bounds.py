"""Where oneDNN's ReLU may be trusted: it turns NaN into 0, while stock's ReLU passes NaN on.

A convolution of finite numbers gives NaN only by overflow: infinity minus infinity. So a ReLU in oneDNN's epilogue is
exact wherever a bound on the result's magnitude stays far below the largest float. The bound of a tensor that this
package wrote is known without reading it, from ``|out| <= max_k sum_c |w_kc| * |x| + |shift| + |residual|``; that of
any other is measured by one read.

A note of a bound is trusted only where nobody else can have written to the tensor: within :func:`private`. No version
counter would tell of a write through ``numpy()`` or ``.data``. The notes lie beside the tensors, not on them.
"""

from __future__ import annotations

import math
import threading
import weakref

import torch
from torch import overrides

Tensor = torch.Tensor

#: Below this no sum of a convolution overflows float32; far enough for all roundings on the way.
SAFE = 1e30
_ENLARGES = "_enlarges"  # on packed weights, which nobody but this package ever holds


class _Scope(threading.local):
    """Bounds by the tensor's identity, while a tensor lives; None outside of every :func:`private`."""

    notes: dict[int, tuple[weakref.ref, float]] | None = None


_scope = _Scope()


class private:
    """Within this, the tensors that are noted are written by nobody but this package, which keeps its notes true.

    Scopes within a scope share its notes; they are dropped when the outermost ends. Where somebody watches each
    operation or each saved tensor, and could write in between, nothing is noted.
    """

    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        self._outer = _scope.notes
        if _is_watched():
            _scope.notes = None
        elif self._outer is None:
            _scope.notes = {}

    def __exit__(self, *_: object) -> None:
        _scope.notes = self._outer


def _is_watched() -> bool:
    modes = torch._C._len_torch_dispatch_stack() or overrides._len_torch_function_stack()
    return bool(modes) or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def remember(t: Tensor, bound: float) -> Tensor:
    """Note a bound of ``max |t|`` until the scope ends or the next note of it; returns `t`."""
    if _scope.notes is not None:
        _scope.notes[id(t)] = (weakref.ref(t), bound)
    return t


def noted(t: Tensor) -> float:
    """The noted bound of `t`; infinite where there is none, without reading it."""
    if _scope.notes is None:
        return math.inf
    ref, bound = _scope.notes.get(id(t), (None, math.inf))
    return bound if ref is not None and ref() is t else math.inf


def is_known(t: Tensor | None) -> bool:
    """Whether :func:`of` need not read `t`."""
    return t is None or noted(t) < SAFE


def of(t: Tensor) -> float:
    """A bound of ``max |t|``: noted, or measured. NaN and infinity are infinite."""
    known = noted(t)
    if known < SAFE:
        return known
    low, high = torch.aminmax(_flat(t)) if t.numel() else (torch.zeros(()), torch.zeros(()))
    bound = max(-low.item(), high.item())
    bound = bound if bound < math.inf else math.inf  # NaN too
    remember(t, bound)
    return bound


def _flat(t: Tensor) -> Tensor:
    """`t` in memory order, so that the reduction is one pass over dense rows."""
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1).reshape(-1)
    return t.reshape(-1)


def of_weight(weight: Tensor) -> float:
    """``max_k sum |w_k|``: by how much a convolution can enlarge. Measured, but where :func:`note_packed` did."""
    if weight.layout != torch.strided:
        return getattr(weight, _ENLARGES, math.inf)
    bound = weight.detach().abs().flatten(1).sum(1, dtype=torch.float32).max().item()
    return 1.01 * bound if bound < math.inf else math.inf  # for the rounding of the sum itself


def note_packed(packed: Tensor, weight: Tensor) -> Tensor:
    """Note on `packed` by how much a convolution with `weight`, from which it was made, can enlarge; returns it."""
    setattr(packed, _ENLARGES, of_weight(weight))
    return packed


def of_result(x: Tensor, weight: Tensor, shift: Tensor | None, residual: Tensor | None) -> float:
    """A bound of ``max |conv(x, weight) + shift + residual|``; infinite where it is not below :data:`SAFE`."""
    shift_bound = of(shift) if shift is not None and shift.numel() else 0.0
    return of_sum(of_weight(weight), of(x), shift_bound, 0.0 if residual is None else of(residual))


def of_sum(enlarges: float, x: float, shift: float, residual: float = 0.0) -> float:
    """As :func:`of_result`, of the bounds themselves."""
    bound = enlarges * x + shift + residual
    return 1.01 * bound if bound < SAFE else math.inf  # NaN compares false
