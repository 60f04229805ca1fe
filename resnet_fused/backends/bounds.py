"""Where oneDNN's ReLU may be trusted: it turns NaN into 0, while stock's ReLU passes NaN on.

A convolution of finite numbers gives NaN only by overflow: infinity minus infinity. So a ReLU in oneDNN's epilogue is
exact wherever a bound on the result's magnitude stays far below the largest float. The bound of a tensor that this
package wrote is known without reading it, from ``|out| <= max_k sum_c |w_kc| * |x| + |shift| + |residual|``, and is
remembered on the tensor; that of any other is measured by one read.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import torch

Tensor = torch.Tensor

#: Below this no sum of a convolution overflows float32; far enough for all roundings on the way.
SAFE = 1e30
_NAME = "_resnet_fused_bound"


_scope = threading.local()


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Within this, tensors are written by nobody else, so that notes on inference tensors can be trusted as well.

    Those have no version counter that would tell of a write; their notes are dropped at the end.
    """
    before, _scope.noted = getattr(_scope, "noted", None), []
    try:
        yield
    finally:
        for t in _scope.noted:
            t.__dict__.pop(_NAME, None)
        _scope.noted = before


def remember(t: Tensor, bound: float) -> Tensor:
    """Note a bound of ``max |t|`` on `t` itself, valid until it is written to; returns `t`."""
    if t.is_inference():
        if getattr(_scope, "noted", None) is None:
            return t
        _scope.noted.append(t)
    setattr(t, _NAME, (bound, _version(t)))
    return t


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def is_known(t: Tensor | None) -> bool:
    """Whether :func:`of` need not read `t`."""
    if t is None:
        return True
    bound, version = getattr(t, _NAME, (math.inf, -1))
    return version == _version(t) and bound < SAFE


def of(t: Tensor) -> float:
    """A bound of ``max |t|``: remembered, or measured. NaN and infinity are infinite."""
    if is_known(t):
        return getattr(t, _NAME)[0]
    low, high = torch.aminmax(_flat(t))
    bound = max(-low.item(), high.item()) if t.numel() else 0.0
    bound = bound if bound < math.inf else math.inf  # NaN too
    remember(t, bound)
    return bound


def _flat(t: Tensor) -> Tensor:
    """`t` in memory order, so that the reduction is one pass over dense rows."""
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1).reshape(-1)
    return t.reshape(-1)


def of_weight(weight: Tensor) -> float:
    """``max_k sum |w_k|``: by how much a convolution can enlarge; remembered like :func:`of`."""
    bound, version = getattr(weight, _NAME, (math.inf, -1))
    if version == _version(weight):
        return bound
    if weight.layout != torch.strided:
        return math.inf  # prepacked without a note of its bound
    bound = weight.detach().abs().flatten(1).sum(1).max().item()
    bound = 1.01 * bound if bound < math.inf else math.inf  # for the rounding of the sum itself
    remember(weight, bound)
    return bound


def of_result(x: Tensor, weight: Tensor, shift: Tensor | None, residual: Tensor | None) -> float:
    """A bound of ``max |conv(x, weight) + shift + residual|``; infinite where it is not below :data:`SAFE`."""
    bound = of_weight(weight) * of(x)
    if shift is not None and shift.numel():
        bound += of(shift)
    if residual is not None:
        bound += of(residual)
    return 1.01 * bound if bound < SAFE else math.inf  # NaN compares false
