"""Whether a CPU's programs run on values: their 1x1 convolutions by our kernels, which apply normalisation on load.

What decides are the passes over activations that are left out, which ``explain`` counts. ``benchmarks/conv1x1.py``
compares both ways, each with all the passes that it takes. Without AVX-512 programs stay on tensors: with AVX2 on a
Zen 3 ResNet-50's step took as long either way (1.29x and 1.34x of eager, benchmarks/results/epyc-avx2-2core/
runs.jsonl:25 and :18), and values kept 10 MB of 783 more.
"""

from __future__ import annotations

import torch

from ..backends.constant import constant_in_graphs
from ..library import status
from ..steps.program import Call
from . import choose, too_small

#: Channels that a vector is filled by; and pixels from which on the weight, which is packed at each call, is the lesser
#: part: at 49 pixels of 2048 channels both ways took the same time.
_VECTOR, _LEAST_PIXELS = 16, 196


def serve(call: Call) -> bool:
    """Whether the CPU's kernels take the 1x1 convolutions of `call`, at the level that they were measured at."""
    x = call.x
    here = x.device.type == "cpu" and not choose.on_gpu(x) and call.program.backend in ("auto", "cpu")
    if not here or x.dtype != torch.float32:
        return False
    return level() == "avx512"


@constant_in_graphs
def level() -> str:
    """The level of the compiled kernels on this machine; "": there are none."""
    library = status()
    return library.build_info["cpu_level"] if library.cpu.loaded else ""


def pay(call: Call, shapes: list[torch.Size]) -> bool:
    """Whether they are expected to be faster than the steps on tensors. `shapes`: of the values."""
    pointwise = [(value, own.weight) for value, node, own in call.convolutions if node.conv.is_pointwise(own.weight)]
    full = all(size % _VECTOR == 0 for _, weight in pointwise for size in weight.shape[:2])
    return full and all(too_small.pixels(shapes[value]) >= _LEAST_PIXELS for value, _ in pointwise)


def pay_averaged(call: Call, conv: int, averaged: torch.Size) -> bool:
    """Whether they are expected to be faster than oneDNN for the convolution that makes value `conv` of averages.

    `averaged`: the shape of its result then. A transition of DenseNet-121 (256, 512 or 1024 channels of 8 images) took
    0.58, 0.59 and 0.82 of the time so (two threads of a Zen 5).
    """
    own = call.tensors[conv - call.program.inputs]
    full = all(size % _VECTOR == 0 for size in own.weight.shape[:2])
    return full and own.bias is None and serve(call) and too_small.pixels(averaged) >= _LEAST_PIXELS
