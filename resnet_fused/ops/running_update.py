"""The running statistics of up to four batch norms after a batch, in place.

Formula (for each norm, per channel; p = momentum; f = M/(M - 1), the values per channel that were seen, 1 for M = 1)::

    running_mean = (1 - p)*running_mean + p*mean
    running_var  = (1 - p)*running_var  + p*(var*f)
    counter      = counter + 1                          where there is one

as PyTorch's operations do it: the product is rounded, the sum is one fused multiply-add, and statistics are rounded to
the buffers' dtype first.

Norms come one after the other, each with `running_mean`, `running_var`, `counter`, `mean`, `var` and its factor f,
momentum behind the first; those that are missing are None. Vectors ``[C]`` with a C for each norm, floating; `counter`:
``[]``, int64. No two of the written tensors may overlap.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .contract import Tensor, define, nbytes

NORMS = 4


class Update(NamedTuple):
    """The arguments of one norm."""

    running_mean: Tensor
    running_var: Tensor
    counter: Tensor | None
    mean: Tensor
    var: Tensor
    factor: float


def _schema() -> str:
    found, letters = [], iter(string.ascii_lowercase)
    for i in range(NORMS):
        optional, default = ("?", "=None") if i else ("", "")
        found += [f"Tensor({next(letters)}!){optional} {name}{i}{default}" for name in ("running_mean", "running_var")]
        found += [f"Tensor({next(letters)}!)? counter{i}{default}"]
        found += [f"Tensor{optional} {name}{i}{default}" for name in ("mean", "var")]
        found += [f"float factor{i}" + ("=1.0" if i else "")]
        found += [] if i else ["float momentum"]
    return f"({', '.join(found)}) -> ()"


def arguments(updates: list[Update], momentum: float) -> tuple:
    """The arguments of a call, from those of up to :data:`NORMS` norms."""
    first, *others = updates
    return (*first, momentum, *(value for update in others for value in update))


#: The arguments' names, in order.
NAMES = tuple(f"{name}{i}" for i in range(NORMS) for name in Update._fields)
NAMES = (*NAMES[: len(Update._fields)], "momentum", *NAMES[len(Update._fields) :])
FORMS = " ".join(f"running_mean{i},running_var{i},mean{i},var{i}:{'CKAB'[i]} counter{i}:1" for i in range(NORMS))


def split(args: tuple, kwargs: dict | None = None) -> tuple[list[Update], float]:
    """Inverse of :func:`arguments`, which may be given by name too; those left out are of norms that are missing."""
    width = len(Update._fields)
    if kwargs:
        args = (*args, *(kwargs.get(name) for name in NAMES[len(args) :]))
    groups = [args[:width], *(args[i : i + width] for i in range(width + 1, len(args), width))]
    return [Update(*group) for group in groups if group[0] is not None], args[width]


def reference(*args, **kwargs) -> None:
    move(*split(args, kwargs))


def move(updates: list[Update], momentum: float) -> None:
    """The formula, for any number of norms."""
    counters = [update.counter for update in updates if update.counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    unbiased = torch._foreach_mul([update.var for update in updates], [update.factor for update in updates])
    batch = [update.mean for update in updates] + list(unbiased)
    running = [update.running_mean for update in updates] + [update.running_var for update in updates]
    if any(b.dtype != r.dtype for b, r in zip(batch, running, strict=True)):
        wide, batch = batch, [torch.empty_like(r) for r in running]
        torch._foreach_copy_(batch, wide)
    torch._foreach_mul_(running, 1 - momentum)
    torch._foreach_add_(running, batch, alpha=momentum)


def fake(*args, **kwargs) -> None:
    return None


def _vectors(args: tuple, kwargs: dict) -> Iterator[tuple[Tensor, Tensor | None]]:
    for update in split(args, kwargs)[0]:
        yield update.running_mean, update.counter


def bytes(*args, **kwargs) -> int:
    """Of each norm two vectors are read, two read and written, and the counter."""
    return sum(6 * nbytes(vector) + 2 * nbytes(counter) for vector, counter in _vectors(args, kwargs))


def flops(*args, **kwargs) -> int:
    """Two products and a sum for each vector; the product with f."""
    return sum(7 * vector.numel() for vector, _ in _vectors(args, kwargs))


OP = define(
    "running_update",
    _schema(),
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    small=True,
    vectors=True,
    forms=FORMS,
)
