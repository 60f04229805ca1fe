"""Calls that were met before: everything that who runs an op, and how, is decided by, as one hashable form.

Declarations and verdicts read shapes, strides, dtypes, devices, alignment and what is no tensor, nothing else of a
call. So calls of one form have one answer, which :mod:`.dispatch` keeps. A call that is anything but plain has no form:
tensor subclasses, fake tensors and other layouts, and whatever is run under a dispatch mode, a transform of functorch's
or a tracer, which have to see each op in the dispatcher.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from . import cards

Tensor = torch.Tensor
_PARAMETER, _STRIDED = torch.nn.Parameter, torch.strided
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracer = torch._C._get_tracing_state


def is_seen() -> bool:
    """Whether a dispatch mode, a transform of functorch's or a tracer has to see each op in the dispatcher."""
    return bool(_modes()) or _transforms() is not None or _tracer() is not None


def form(op: str, backend: str, args: tuple, kwargs: dict) -> Hashable:
    """What makes this call another one; None for a call that is not plain."""
    if is_seen():
        return None
    parts: list[Hashable] = [op, backend, *kwargs, cards.assumed(), args[0].device]
    add = parts.append  # one flat list, and one index for a device: this runs at every call of an op
    values = [*args, *kwargs.values()]
    for value in values:  # which grow by what is in lists
        if value is None:
            add(value)
            continue
        kind = type(value)
        if kind is Tensor or kind is _PARAMETER:
            if value.layout is not _STRIDED:
                return None
            add(value.shape)
            add(value.stride())
            add(value.dtype)
            add(value.get_device())
            add(not value.data_ptr() & 15)
        elif isinstance(value, Tensor):
            return None
        elif kind is list and any([isinstance(one, Tensor) for one in value]):  # noqa: C419 (is faster)
            add(len(value))
            values += value
        else:
            add(tuple(value) if kind is list else value)
    return tuple(parts)
