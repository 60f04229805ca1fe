"""Which average pools a program may have, and which are taken before the 1x1 convolution that they stand behind."""

from __future__ import annotations

import torch

from ..steps.batch_norm import pixels
from ..steps.program import Addition, Averaging, Call, Convolution, Normalisation, Pooling, Program


def obstacle(program: Program, value: int, node: Averaging) -> str:
    """Why no step runs the average that makes `value`; empty if one does."""
    before = program.maker(node.source)
    if isinstance(before, Addition | Pooling | Averaging):
        return "an average pool of something but an input, a batch norm or a convolution"
    if not isinstance(before, Convolution):
        return ""
    norm = program.maker(before.source)
    if not isinstance(norm, Normalisation) or not norm.relu or program.readers(before.source) != (node.source,):
        return "an average pool of a convolution of something but a batch norm with ReLU of its own"
    alone = value == program.output and program.readers(node.source) == (value,)
    return "" if alone else "an average pool of a convolution within the block"


def comes_first(call: Call, shapes: list[torch.Size], conv: int) -> bool:
    """Whether an average alone reads the convolution that makes value `conv`, and is the same before it.

    `shapes`: of the values. A mean over a whole window of sums over channels, and of a bias, is the sum of the means.
    """
    program, readers = call.program, call.program.readers(conv)
    node = program.maker(conv)
    average = program.maker(readers[0]) if len(readers) == 1 else None
    if not isinstance(node, Convolution) or not isinstance(average, Averaging):
        return False
    pointwise = node.conv.is_pointwise(call.tensors[conv - program.inputs].weight) and node.conv.stride == (1, 1)
    return pointwise and average.average.is_whole(shapes[conv])


def whole(call: Call) -> frozenset[int]:
    """The averages of whole windows, and, of those behind a convolution, the ones that are the same before it."""
    shapes, found = call.shapes(), set()
    for value, node in call.program.numbered:
        if isinstance(node, Averaging) and node.average.is_whole(shapes[node.source]):
            behind = isinstance(call.program.maker(node.source), Convolution)
            found |= {value} if not behind or comes_first(call, shapes, node.source) else set()
    return frozenset(found)


def saved_products(call: Call, shapes: list[torch.Size]) -> int:
    """Multiplications that convolutions are spared by averages before them, forward. `shapes`: of the values."""
    saved = 0
    for value, _, own in call.convolutions:
        if comes_first(call, shapes, value):
            (average,) = call.program.readers(value)
            saved += own.weight.numel() * (pixels(shapes[value]) - pixels(shapes[average]))
    return saved
