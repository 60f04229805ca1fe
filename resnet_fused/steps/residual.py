"""The programs of blocks that end in a residual: convolutions with a norm each, a shortcut, and the sum."""

from __future__ import annotations

from .program import Addition, Convolution, Node, Normalisation, Pooling, Program
from .spec import Conv, Norm, Pool


def residual_program(
    steps: list[tuple[Conv, Norm]],
    shortcut: tuple[Conv, Norm] | None = None,
    *,
    residual: str = "",
    relu: bool = True,
    sampled: bool = False,
    pool: Pool | None = None,
    backend: str = "auto",
) -> Program:
    """``conv-bn-relu`` for all `steps` but the last, then ``conv-bn (+ residual) (-> relu) (-> pool)``.

    The nodes are those of `steps` in order, two for each, then those of the `shortcut`, a projection of the input, then
    the addition and the pool, if there are such. `residual`: "x", the input itself, or "tensor", from outside.
    """
    inputs = 2 if residual == "tensor" else 1
    nodes: list[Node] = []

    def pair(source: int, conv: Conv, norm: Norm, **more) -> int:
        nodes.append(Convolution(source, conv))
        nodes.append(Normalisation(inputs + len(nodes) - 1, norm, **more))
        return inputs + len(nodes) - 1

    value, joined = 0, shortcut is not None or residual != ""
    for i, step in enumerate(steps):
        last = {"relu": relu and not joined, "sampled": sampled and not joined} if i == len(steps) - 1 else {}
        value = pair(value, *step, **last)
    if joined:
        other = 1 if inputs == 2 else 0 if shortcut is None else pair(0, *shortcut, relu=False)
        nodes.append(Addition(value, other, relu, sampled))
        value = inputs + len(nodes) - 1
    if pool is not None:
        nodes.append(Pooling(value, pool))
    return Program(tuple(nodes), inputs, backend)
