"""Several convolutions, each with all that follows it, one after another: a block in evaluation as one call.

Values are numbered: `x` is 0, `residual`, if given, the next, then the results of the convolutions in their order.
Convolution i is :mod:`.conv_norm_add_relu` of what `tensors`, `steps` and `eps` hold for it::

    tensors  weight, bias, mean, var, gamma, beta                            (all but the weight may be None)
    steps    value read, value added (-1: none), whether it has a ReLU, and two each of stride, padding and dilation
    eps      that of its batch norm

`out` is the result of the last. Results before it are rounded to the dtype of `x`; each goes as soon as it was read for
the last time, or is overwritten by the sum that is the last to read it. A projection, a 1x1 convolution without ReLU
that a 1x1 convolution of stride 1 adds, and nobody else reads, is an exception (:func:`joined`): a GPU's kernel makes
both in one launch, :mod:`.conv1x1_join`, and never writes nor rounds it.

Nothing is folded and nothing kept: a GPU's kernel has scale and shift in its epilogue, where they cost nothing. A
folded weight would be rounded once more, in 16 bits, and compared with its origin at every call.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from . import conv_norm_add_relu
from .contract import OPS, Tensor, channels_last_strides, define
from .conv_add_relu import is_convolution, output_shape

SCHEMA = "(Tensor x, Tensor? residual, Tensor?[] tensors, int[] steps, float[] eps) -> Tensor out"
INTS, TENSORS = 9, 6  # of a convolution


class Link(NamedTuple):
    """One convolution of a chain."""

    source: int  # the value that it reads
    residual: int  # the value that it adds; -1: none
    relu: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def integers(self) -> tuple[int, ...]:
        """Its entries in `steps`."""
        return self.source, self.residual, int(self.relu), *self.stride, *self.padding, *self.dilation


def links(steps: Sequence[int]) -> list[Link]:
    """The convolutions that `steps` are of."""
    found = (steps[i : i + INTS] for i in range(0, len(steps), INTS))
    return [Link(*s[:2], bool(s[2]), *(tuple(s[i : i + 2]) for i in (3, 5, 7))) for s in found]


def arguments(
    values: Sequence[Tensor], tensors: Sequence[Tensor | None], link: Link, eps: float
) -> tuple[Tensor | float | bool | tuple | None, ...]:
    """Of `conv_norm_add_relu`, for one convolution. `tensors`: its own."""
    residual = None if link.residual < 0 else values[link.residual]
    return values[link.source], *tensors, eps, residual, *link[3:], link.relu


def joined(chain: Sequence[Link], weights: Sequence[torch.Size], inputs: int) -> dict[int, int]:
    """The projections that are never written, by the convolution that adds each: places in the chain.

    `weights`: their shapes, `inputs`: how many values are there before the chain. csrc/conv_chain.h has the same rule.
    """
    reads = collections.Counter(value for link in chain for value in (link.source, link.residual))
    found = {}
    for i, link in enumerate(chain):
        made = link.residual - inputs
        plain = weights[i][2:] == (1, 1) and link.padding == (0, 0)
        if made < 0 or not plain or link.stride != (1, 1) or reads[link.residual] > 1:
            continue
        other = chain[made]
        if other.residual < 0 and not other.relu and weights[made][2:] == (1, 1) and other.padding == (0, 0):
            found[i] = made
    return found


def is_chain(
    residual: Tensor | None, tensors: Sequence[Tensor | None], steps: Sequence[int], eps: Sequence[float]
) -> bool:
    """Whether these are of equally many convolutions, each with a weight, that read values which are there."""
    count, inputs = len(eps), 1 if residual is None else 2
    if len(tensors) != TENSORS * count or len(steps) != INTS * count or any(t is None for t in tensors[::TENSORS]):
        return False
    chain = enumerate(links(steps), inputs)
    return all(0 <= link.source < made and -1 <= link.residual < made for made, link in chain)


def convolutions(
    x: Tensor,
    residual: Tensor | None,
    tensors: Sequence[Tensor | None],
    steps: Sequence[int],
    eps: Sequence[float],
) -> Iterator[tuple]:
    """Of each convolution the arguments that `conv_norm_add_relu` has; what one makes is a meta tensor to the next.

    As far as they are a chain: of the rest the op says what is wrong.
    """
    if not is_chain(residual, tensors, steps, eps):
        return
    values = [x] if residual is None else [x, residual]
    for i, (link, own) in enumerate(zip(links(steps), eps, strict=True)):
        given = arguments(values, tensors[TENSORS * i : TENSORS * (i + 1)], link, own)
        yield given
        read = values[link.source]
        if not is_convolution(read.shape, given[1].shape, *link[3:]):
            return
        shape = output_shape(read.shape, given[1].shape, *link[3:])
        if any(size < 0 for size in shape) or math.prod(shape) >= 1 << 60:  # there is no such tensor
            return
        made = torch.empty_strided(shape, channels_last_strides(shape), dtype=x.dtype, device="meta")
        values.append(made)


def parts(*args) -> Iterator[tuple[str, tuple]]:
    """The ops that a chain stands for on a GPU, with their arguments; of scales and shifts there are none yet."""
    _, residual, tensors, steps, _ = args
    chain, given = links(steps), [*convolutions(*args)]
    second = joined(chain, [t.shape for t in tensors[::TENSORS]], 1 if residual is None else 2)
    for i, own in enumerate(given):
        if i in second:
            other, link = given[second[i]], chain[second[i]]
            none, relu = [None] * 2, chain[i].relu
            yield "conv1x1_join", (*own[:2], *none, *none, *none, None, *other[:2], *none, link.stride, None, relu)
        elif i not in second.values():
            yield "conv_norm_add_relu", own


def reference(
    x: Tensor, residual: Tensor | None, tensors: list[Tensor | None], steps: list[int], eps: list[float]
) -> Tensor:
    values = [x] if residual is None else [x, residual]
    for i, (link, own) in enumerate(zip(links(steps), eps, strict=True)):
        given = arguments(values, tensors[TENSORS * i : TENSORS * (i + 1)], link, own)
        values.append(conv_norm_add_relu.reference(*given))
    return values[-1]


def fake(
    x: Tensor, residual: Tensor | None, tensors: list[Tensor | None], steps: list[int], eps: list[float]
) -> Tensor:
    shapes = [x.shape] if residual is None else [x.shape, residual.shape]
    for i, link in enumerate(links(steps)):
        shapes.append(output_shape(shapes[link.source], tensors[TENSORS * i].shape, *link[3:]))
    return x.new_empty_strided(shapes[-1], channels_last_strides(shapes[-1]))


def bytes(*args) -> int:
    """Of its convolutions, which write and read what is between them."""
    return sum(OPS[name].bytes(*given) for name, given in parts(*args))


def flops(*args) -> int:
    """Of its convolutions."""
    return sum(OPS[name].flops(*given) for name, given in parts(*args))


OP = define(
    "conv_chain",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    parts=parts,
    ulps=8,
)
