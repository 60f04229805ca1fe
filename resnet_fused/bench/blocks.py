"""The distinct blocks of a model: same modules on the same input shape are one block, however often they occur."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable

import torch
from torch import nn

#: Where blocks say how often they are dropped, which is what alone linear decay makes different in them.
DROPPING = re.compile(r"((?:StochasticDepth\(p=|DropPath\(drop_prob=))0\.\d+")


@dataclasses.dataclass
class Block:
    """One kind of block in a model."""

    name: str  # of the first module of this kind
    example: torch.Tensor  # its input in the run that found it
    alike: int = 1  # how many modules of the model are of this kind

    def label(self, batch: int) -> str:
        """Name, how often, and input shape, e.g. ``layer1.1 x2 [16, 256, 56, 56]``."""
        times = f" x{self.alike}" if self.alike > 1 else ""
        return f"{self.name}{times} {[batch, *self.example.shape[1:]]}"


def distinct_blocks(stock: nn.Module, names: Iterable[str], x: torch.Tensor) -> list[Block]:
    """The kinds among the modules called `names`, in the order in which a training forward of `stock` on `x` runs them.

    `stock` is not changed. Modules that do not take exactly one tensor of four dimensions, or that `x` does not reach,
    are left out; so is the model itself, whose name is empty.
    """
    model = copy.deepcopy(stock).train()  # a forward moves running statistics
    kinds: dict[tuple, Block] = {}
    for name in filter(None, names):
        model.get_submodule(name).register_forward_pre_hook(_recorder(kinds, name))
    with torch.no_grad():
        model(x)
    return list(kinds.values())


def _recorder(kinds: dict[tuple, Block], name: str):
    def record(module: nn.Module, args: tuple) -> None:
        if len(args) != 1 or not isinstance(args[0], torch.Tensor) or args[0].dim() != 4:
            return
        kind = DROPPING.sub(r"\1...", repr(module)), args[0].shape
        if kind in kinds:
            kinds[kind].alike += 1
        else:
            kinds[kind] = Block(name, args[0].clone())

    return record
