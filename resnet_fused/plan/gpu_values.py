"""Which convolutions of a GPU's program are by kernels of any filter, with what is beside them.

By `conv_values` those before or behind a norm that the 1x1 ops do not take, and that move less so: in units of what it
writes, a 3x3 behind a norm and before one moves 2 forward instead of 5, or 3 where what it reads is kept for backward;
backward it moves the same.

By `conv_join` those before a frozen norm, with that and what is behind (:mod:`..steps.frozen`); the 1x1 ones too, where
the 1x1 ops do not take them. A 3x3 between two such norms moves 2.1 forward, with bits of 16-bit data, as it does on
values, and 4 to 6.1 backward instead of 8 to 10; of these 4 are PyTorch's gradients.

`conv_values` not on a B200: by its machine code it reaches a sixth of the peak of tensor cores there, and fewer bytes
do not make up for that (`benchmarks/values_or_cudnn.py`: cuDNN's convolution at 0.23 of the peak is as fast with all
the passes around it, or at 0.34 one with a stride). An H100 is undecided, at 0.31 to 0.78 for most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..backends import cuda_conv, tf32
from ..ops import DATA_DTYPES
from ..steps.frozen import FrozenJoin
from ..steps.program import Addition, Call, Convolution, Normalisation
from . import averages, choose, devices

#: Major compute capability of GPUs whose tensor cores do a multiple of what `mma.sync` asks of them.
ASYNCHRONOUS = 10


def taps(call: Call) -> frozenset[int]:
    """The convolutions that `conv_values` takes on a GPU, and that move less by it, by the values that they make."""
    if not _serves(call, "conv_values"):
        return frozenset()
    if (choose.target() or devices.of(call.x.device)).capability[0] == ASYNCHRONOUS:
        return frozenset()
    program, found = call.program, set()
    for value, node, own in call.convolutions:
        saves = program.meets_batch(value) or program.is_lazy(node.source)
        if saves and own.bias is None and fits(call, value):
            found.add(value)
    return frozenset(found)


def _serves(call: Call, op: str) -> bool:
    """Whether a GPU's kernel of `op`, which multiplies on tensor cores, takes data as those of `call`."""
    x = call.x
    if not choose.on_gpu(x) or x.dtype not in DATA_DTYPES or (x.dtype == torch.float32 and not tf32.allowed()):
        return False
    return not choose.lacking((op,), x, call.program.backend)


def fits(call: Call, value: int) -> bool:
    """Whether the compiled kernels take the convolution that makes `value`: by its groups, sizes and dtype."""
    own = call.tensors[value - call.program.inputs]
    return own.weight.dtype == call.x.dtype and not _limits(call, value)


def ones_fit(call: Call) -> bool:
    """Whether they take all 1x1 convolutions by their sizes; Triton's take any."""
    ones = (value for value, node, own in call.convolutions if node.conv.is_pointwise(own.weight))
    return not any(_limits(call, value) for value in ones)


def _limits(call: Call, value: int) -> list[str]:
    node, own = call.program.maker(value), call.tensors[value - call.program.inputs]
    return cuda_conv.limits(call.shapes()[node.source], own.weight.shape, *node.conv.args[:3])


def frozen(call: Call, values: bool) -> frozenset[int]:
    """The frozen norms that are part of their convolution's launch. `values`: 1x1 convolutions are by the 1x1 ops."""
    program = call.program
    if not choose.on_gpu(call.x):
        return frozenset()
    norms = [value for value, node in program.numbered if _is_frozen(call, value)]
    if not norms:
        return frozenset()
    joins, found = _serves(call, "conv_join"), set()
    for norm in norms:
        conv = program.maker(norm).source
        if (values and _by_ones(call, norm, joins=True)) or (joins and fits(call, conv)):
            found.add(norm)
    for value, node in program.numbered:  # of what is joined all, or none
        terms = program.terms(value) if isinstance(node, Addition) or value == program.output else None
        if terms is not None and not found.issuperset(terms.norms):
            found.difference_update(terms.norms)
    return frozenset(found)


def _is_frozen(call: Call, value: int) -> bool:
    """Whether a value is a frozen norm of a convolution that it alone reads, and is read as a tensor or joined."""
    program, node = call.program, call.program.maker(value)
    if not isinstance(node, Normalisation) or node.norm.batch_stats or node.act is not None:
        return False
    if not isinstance(program.maker(node.source), Convolution) or program.readers(node.source) != (value,):
        return False
    if any(averages.comes_first(call, call.shapes(), reader) for reader in program.readers(value)):
        return False
    return all(isinstance(program.maker(reader), Convolution | Addition) for reader in program.readers(value))


def _by_ones(call: Call, norm: int, joins: bool = False) -> bool:
    """Whether the 1x1 ops take the gradients of the convolution before a norm; `joins`: and its forward."""
    conv = call.program.maker(norm).source
    node, own = call.program.maker(conv), call.tensors[conv - call.program.inputs]
    return node.conv.is_pointwise(own.weight) and own.bias is None and (not joins or node.conv.stride == (1, 1))


def frozen_step(call: Call, value: int, on_value: Callable[[int], bool] | None, one_pass: bool) -> FrozenJoin:
    """The step of the frozen norms that are joined in `value`.

    `on_value`: of a convolution, whether the 1x1 ops take it; None: they take none.
    """
    program, terms = call.program, call.program.terms(value)
    ones = () if on_value is None else tuple(norm for norm in terms.norms if _by_ones(call, norm))
    joins = ones == tuple(terms.norms) and _by_ones(call, terms.branch, joins=True)
    readers, node = program.readers(value), program.maker(value)
    alone = len(readers) == 1 and isinstance(program.maker(readers[0]), Convolution)
    through = on_value is not None and alone and isinstance(node, Normalisation) and on_value(readers[0])
    how = {"joins": joins, "by_ones": ones, "packs_mask": not through}
    return FrozenJoin(value, gram=True, gram_other=terms.projected, one_pass=one_pass, **how)
