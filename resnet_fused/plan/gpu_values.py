"""Which convolutions of a GPU's program are by `conv_values`: they normalise on load, and emit their statistics.

Those that the 1x1 ops do not take, and that move less so: in units of what it writes, a 3x3 behind a norm and before
one moves 2 forward instead of 5, or 3 where what it reads is kept for backward. Backward moves the same.
"""

from __future__ import annotations

import torch

from ..backends import cuda_conv, tf32
from ..ops import DATA_DTYPES
from ..steps.program import Call
from . import choose


def taps(call: Call) -> frozenset[int]:
    """The convolutions that `conv_values` takes on a GPU, and that move less by it, by the values that they make."""
    x, program = call.x, call.program
    if not choose.on_gpu(x) or x.dtype not in DATA_DTYPES or (x.dtype == torch.float32 and not tf32.allowed()):
        return frozenset()
    if choose.lacking(("conv_values",), x, program.backend):
        return frozenset()
    found, shapes = set(), call.shapes()
    for value, node, own in call.convolutions:
        saves = program.meets_batch(value) or program.is_lazy(node.source)
        if not saves or own.bias is not None or own.weight.dtype != x.dtype:
            continue
        if not cuda_conv.limits(shapes[node.source], own.weight.shape, *node.conv.args[:3]):
            found.add(value)
    return frozenset(found)
