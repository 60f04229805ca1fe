"""The end of a stem: batch norm, ReLU and max pool in one pass; what lies between is never written.

Backward the gradient reaches the stem's convolution from the pool's output, through nothing of the size between.
"""

from __future__ import annotations

import dataclasses

from ..backends import run
from .batch_norm import coefficients
from .flow import Backward, Forward
from .kinds import norm_grads
from .lazy import LazyGrad, Pending
from .program import Program


@dataclasses.dataclass(frozen=True)
class PooledNorm:
    """The pool that makes `value`, of a norm with ReLU, which has a step of its own before."""

    value: int

    def ops(self, program: Program) -> tuple[str, ...]:
        return "norm_relu_pool", "norm_relu_pool_backward", "norm_relu_pool_apply"

    def forward(self, f: Forward) -> None:
        node = f.program.maker(self.value)
        z, bn = f.values[node.source][:2]
        out, winners = run("norm_relu_pool", z, bn.scale, bn.shift, *node.pool.args, backend=f.backend)
        f.values[self.value] = f.output = out
        f.winners[self.value] = winners

    def backward(self, b: Backward) -> None:
        node, grad = b.program.maker(self.value), b.dense(self.value)
        if grad is None:
            return
        norm, (z, bn, _) = b.program.maker(node.source), b.values[node.source]
        read = (grad.grad, b.winners[self.value], z)
        sums = run("norm_relu_pool_backward", *read, bn.mean, bn.scale, bn.shift, *node.pool.args, backend=b.backend)
        c = coefficients(bn, *sums, z, norm.norm, b.backend)
        norm_grads(b, node.source, LazyGrad(grad.grad, z, c, bn))
        if b.wanted[norm.source]:
            vectors = (c.a, c.b, c.d, bn.scale, bn.shift)
            dz = run("norm_relu_pool_apply", *read, *vectors, *node.pool.args, backend=b.backend)
            b.give(norm.source, Pending(dz))
