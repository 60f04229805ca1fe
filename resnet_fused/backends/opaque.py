"""One dispatcher op for each op of the contract, that chooses its backend when it runs.

``torch.compile`` and ``torch.export`` put these into their graphs: a graph then holds the op, not the choice, and
neither declarations nor first-use checks are ever run on fake tensors.
"""

from __future__ import annotations

import re

import torch

from ..ops import OPS, Op

NAMESPACE = "resnet_fused_auto"
_library = torch.library.Library(NAMESPACE, "DEF")


def _schema(op: Op) -> str:
    """The op's, with a backend; without defaults from an argument `kernel` on.

    ``torch.compile`` hands arguments that equal their defaults by name to a function of its own, which has one of that
    name; those without a default it hands on by position.
    """
    arguments, arrow, results = op.schema.rpartition(" -> ")
    before, kernel, behind = arguments.partition(" kernel=")
    arguments = before + re.sub("=[^,)]+", "", kernel + behind)
    return f"{op.name}{arguments.removesuffix(')')}, *, str backend='auto'){arrow}{results}"


def define_all(run) -> None:
    """Define the ops; `run(name, *args, backend=..., **kwargs)` is what each does."""
    for op in OPS.values():
        _library.define(_schema(op))
        _library.impl(op.name, _implementation(op, run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", _fake(op), lib=_library)


def _implementation(op: Op, run):
    def implementation(*args, **kwargs):
        return run(op.name, *args, **kwargs)

    return implementation


def _fake(op: Op):
    def fake(*args, backend="auto", **kwargs):
        return op.fake(*args, **kwargs)

    return fake
