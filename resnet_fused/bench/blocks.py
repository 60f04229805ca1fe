"""The distinct blocks of a model: same modules on the same input shape are one block, however often they occur."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Block:
    """One kind of block in a model."""

    name: str  # of the first module of this kind
    alike: int  # how many modules of the model are of this kind
    shape: tuple[int, ...]  # of its input

    @property
    def label(self) -> str:
        """Name, how often, and input shape, e.g. ``layer1.1 x2 [16, 256, 56, 56]``."""
        times = f" x{self.alike}" if self.alike > 1 else ""
        return f"{self.name}{times} {list(self.shape)}"


def distinct_blocks(stock: nn.Module, names: Iterable[str], x: torch.Tensor) -> list[Block]:
    """The kinds among the modules called `names`, found by running `stock` on `x` once, without gradients.

    Modules that do not take exactly one tensor of four dimensions, or that `x` does not reach, are left out.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    handles = [stock.get_submodule(name).register_forward_pre_hook(_recorder(shapes, name)) for name in names if name]
    was_training = stock.training
    try:
        with torch.no_grad():
            stock.eval()(x)
    finally:
        stock.train(was_training)
        for handle in handles:
            handle.remove()
    kinds: dict[tuple, list[str]] = {}
    for name, shape in shapes.items():  # in the order in which they ran
        kinds.setdefault((repr(stock.get_submodule(name)), shape), []).append(name)
    return [Block(alike[0], len(alike), shape) for (_, shape), alike in kinds.items()]


def _recorder(shapes: dict[str, tuple[int, ...]], name: str):
    def record(module: nn.Module, args: tuple) -> None:
        if len(args) == 1 and isinstance(args[0], torch.Tensor) and args[0].dim() == 4:
            shapes.setdefault(name, tuple(args[0].shape))

    return record
