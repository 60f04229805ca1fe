"""Dense blocks of other people's models: recognised by class, see :mod:`..blocks.dense`, and swapped as others are."""

from __future__ import annotations

from torch import nn

from ..blocks import dense
from ..steps.dense import CHECKPOINTED, KEPT, RECOMPUTED
from . import swap
from .instructions import Form, Ref, ShapeCall
from .swap import STATE
from .trace import Untraceable

PREFERENCES = {"speed": KEPT, "memory": RECOMPUTED}


def is_block(module: nn.Module) -> bool:
    """Whether `module`, fused or not, is of a class that is known as a dense block."""
    return dense.kind_of(swap.stock_class(module)) is not None


def form(module: nn.Module, prefer: str | None) -> Form:
    """The form of a dense block. `prefer`: None, as it is fused now, else speed.

    Raises:
        Untraceable: it is not what others of its class are.
    """
    cls = swap.stock_class(module)
    if reason := dense.why_not(module, cls):
        raise Untraceable(reason)
    kind, before = dense.kind_of(cls), module.__dict__.get(STATE)
    otherwise = PREFERENCES[prefer or "speed"]
    if prefer is None and before is not None and before.forms[0].shapes[0].program.dense != CHECKPOINTED:
        otherwise = before.forms[0].shapes[0].program.dense
    saves = dense.saves_of(module, kind, otherwise)
    (shape,) = dense.shapes_of(tuple(module._modules), kind.layer[1], kind.relus, saves)
    return Form((ShapeCall(shape, ("x",), "out"),), "x", Ref("out"), (), (), tuple(shape.modules))
