"""Which convolutions of a GPU's program are by `conv_values`: they normalise on load, and emit their statistics.

Those that the 1x1 ops do not take, and that move less so: in units of what it writes, a 3x3 behind a norm and before
one moves 2 forward instead of 5, or 3 where what it reads is kept for backward. Backward moves the same.

Not on a B200: by its machine code the kernel reaches a sixth of the peak of tensor cores there, and fewer bytes do not
make up for that (`benchmarks/values_or_cudnn.py`: a convolution of cuDNN's at 0.23 of the peak is as fast with all the
passes around it, or at 0.34 one with a stride). An H100 is undecided, at 0.31 to 0.78 for most.
"""

from __future__ import annotations

import torch

from ..backends import cuda_conv, tf32
from ..ops import DATA_DTYPES
from ..steps.program import Call
from . import choose, devices

#: Major compute capability of GPUs whose tensor cores do a multiple of what `mma.sync` asks of them.
ASYNCHRONOUS = 10


def taps(call: Call) -> frozenset[int]:
    """The convolutions that `conv_values` takes on a GPU, and that move less by it, by the values that they make."""
    x, program = call.x, call.program
    if not choose.on_gpu(x) or x.dtype not in DATA_DTYPES or (x.dtype == torch.float32 and not tf32.allowed()):
        return frozenset()
    if choose.lacking(("conv_values",), x, program.backend):
        return frozenset()
    if (choose.target() or devices.of(x.device)).capability[0] == ASYNCHRONOUS:
        return frozenset()
    found, shapes = set(), call.shapes()
    for value, node, own in call.convolutions:
        saves = program.meets_batch(value) or program.is_lazy(node.source)
        if not saves or own.bias is not None or own.weight.dtype != x.dtype:
            continue
        if not cuda_conv.limits(shapes[node.source], own.weight.shape, *node.conv.args[:3]):
            found.add(value)
    return frozenset(found)
