"""The step of a batch norm with an activation other than ReLU behind it: one pass forward, two backward.

Saved are the norm's input and, for the convolution that reads it, the value; the norm's output is made again. Stock
saves all three. The value is written, and a tensor like a block's input: nothing is applied on load.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ..backends import run
from .batch_norm import coefficients
from .flow import Backward, Forward
from .kinds import Kind, norm_grads, norm_ops, normalised
from .lazy import Lazy, Pending
from .program import Program


@dataclasses.dataclass(frozen=True)
class Activate(Kind):
    """The batch norm and the activation that make `value`, of a raw tensor; `emitted`: as of `kinds.Normalise`."""

    word: ClassVar[str] = "norm and activation in one pass"

    emitted: bool = False

    def ops(self, program: Program) -> tuple[str, ...]:
        node = program.maker(self.value)
        reads = ("bn_stats",) if node.norm.batch_stats and not self.emitted else ()
        return *reads, *norm_ops(node), "norm_act", "norm_act_backward", "norm_act_apply"

    def forward(self, f: Forward) -> None:
        act, lazy = f.program.maker(self.value).act, normalised(f, self.value)
        out = run("norm_act", lazy.z, lazy.bn.scale, lazy.bn.shift, *act.args, backend=f.backend)
        f.values[self.value] = out
        if f.wanted[self.value]:
            f.activated[self.value] = lazy
        if self.value == f.program.output:
            f.output = out

    def remade_from(self, b: Backward) -> list[Lazy]:
        """See :mod:`.remade`."""
        return [b.activated[self.value]]

    def remade(self, b: Backward) -> Tensor:
        """The value, as forward made it."""
        (z, bn, _), act = b.activated[self.value], b.program.maker(self.value).act
        return run("norm_act", z, bn.scale, bn.shift, *act.args, backend=b.backend)

    def backward(self, b: Backward, grad: Pending) -> None:
        node, (z, bn, _) = b.program.maker(self.value), b.activated[self.value]
        read = grad.grad, z, bn.mean, bn.scale, bn.shift
        sums = run("norm_act_backward", *read, *node.act.args, backend=b.backend)
        c = coefficients(bn, *sums, z, node.norm, b.backend)
        norm_grads(b, self.value, c)
        if not b.wanted[node.source]:
            return
        arguments = grad.grad, z, c.a, c.b, c.d, bn.scale, bn.shift, *node.act.args
        if grad.owned and b.in_place and z.device.type == "cpu" and b.backend != "triton":  # whose interpreter has none
            run("norm_act_apply_", *arguments, backend=b.backend)
            b.give(node.source, Pending(grad.grad))
        else:
            b.give(node.source, Pending(run("norm_act_apply", *arguments, backend=b.backend)))
