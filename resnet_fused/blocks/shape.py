"""Programs whose settings are those of modules, by name: what a block is recognised as, or built as."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch

from ..steps import Conv, Norm, Pool
from ..steps.program import Pooling, Program
from ..steps.residual import residual_program

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A program whose settings are those of modules, by name. Plain data: it copies and pickles."""

    program: Program  # its convolutions, norms and pool as they are by default
    names: tuple[str, ...]  # of each node's module; "" for additions
    bypassed: tuple[Pair, ...] = ()  # modules that are not called either: name and class
    drop_path: str = ""  # which of these draws the factors of the addition that is `sampled`
    inplace_add: bool = False  # additions are in place: the result keeps the branch's dtype

    @property
    def modules(self) -> list[str]:
        """The names of all modules that the program stands in for."""
        return [name for name in (*self.names, *(name for name, _ in self.bypassed)) if name]


def remembered(make: Callable[..., tuple[Shape, ...]]) -> Callable[..., tuple[Shape, ...]]:
    """`make`, which makes shapes, with the same objects again, by which sites are kept; in a traced graph, new ones."""
    known = functools.cache(make)
    return lambda *args: (make if torch.compiler.is_compiling() else known)(*args)


def residual_shape(
    steps: Iterable[Pair],
    shortcut: Pair | None = None,
    pool: str = "",
    bypassed: tuple[Pair, ...] = (),
    inplace_add: bool = False,
    **options,
) -> Shape:
    """The shape of a :func:`residual_program` of the convolutions and norms of these names; `options`: its others."""
    steps, plain = list(steps), (Conv(), Norm())
    projection, pairs = (None, steps) if shortcut is None else (plain, [*steps, shortcut])
    program = residual_program([plain] * len(steps), projection, pool=Pool() if pool else None, **options)
    names = [name for pair in pairs for name in pair]
    names += [pool if isinstance(node, Pooling) else "" for node in program.nodes[len(names) :]]
    return Shape(program, tuple(names), bypassed, "", inplace_add)
