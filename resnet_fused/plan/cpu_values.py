"""Whether a CPU's programs run on values: their 1x1 convolutions by our kernels, which apply normalisation on load.

What decides are the passes over activations that are left out, which ``explain`` counts. ``benchmarks/conv1x1.py``
compares both ways, each with all the passes that it takes. Without AVX-512 nothing is measured, and programs stay on
tensors.
"""

from __future__ import annotations

import torch

from ..library import status
from ..steps.conv import PANEL
from ..steps.program import Addition, Call, Convolution
from . import choose, too_small

#: Whether bfloat16 runs on values. The kernels are there and tested, but gain nothing: interleaved in one process, a
#: ResNet-50 step ran at 1.08 of stock's speed on values and 1.07 on tensors at batch 16, at 1.06 and 1.04 at batch 8.
MULTIPLIES_BF16 = False

#: Channels that a vector is filled by; and pixels from which on the weight, which is packed at each call, is the lesser
#: part: at 49 pixels of 2048 channels both ways took the same time.
_VECTOR, _LEAST_PIXELS = 16, 196
#: What ours and our weight gradients save in bfloat16 of the convolutions' time, of which oneDNN's strided ones and
#: weight gradients reach half to three quarters of what products do: in layer3 and layer4 of ResNet-50 at batch 16.
_SAVED = 0.1


def serve(call: Call) -> bool:
    """Whether the CPU's kernels take the 1x1 convolutions of `call`, at the level that they were measured at."""
    x = call.x
    here = x.device.type == "cpu" and not choose.on_gpu(x) and call.program.backend in ("auto", "cpu")
    if not here or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x.dtype == torch.bfloat16:
        return MULTIPLIES_BF16 and not _adds_to_a_convolution(call)
    return level() == "avx512"


def _adds_to_a_convolution(call: Call) -> bool:
    """Whether a sum has a convolution for its branch: one product for both, which there is in float32 alone."""
    sums = (node for node in call.program.nodes if isinstance(node, Addition))
    return any(isinstance(call.program.maker(node.branch), Convolution) for node in sums)


@torch.compiler.assume_constant_result
def level() -> str:
    """The level of the compiled kernels on this machine; "": there are none."""
    library = status()
    return library.build_info["cpu_level"] if library.cpu.loaded else ""


def pay(call: Call, shapes: list[torch.Size]) -> bool:
    """Whether they are expected to be faster than the steps on tensors. `shapes`: of the values."""
    pointwise = [(value, own.weight) for value, node, own in call.convolutions if node.conv.is_pointwise(own.weight)]
    vector = PANEL if call.x.dtype == torch.bfloat16 else _VECTOR
    full = all(size % vector == 0 for _, weight in pointwise for size in weight.shape[:2])
    return full and all(too_small.pixels(shapes[value]) >= _LEAST_PIXELS for value, _ in pointwise)


def outweigh(call: Call, shapes: list[torch.Size]) -> bool:
    """Whether what they save in bfloat16 is more than the time of Python, also where all stays in the cache."""
    return call.x.dtype == torch.bfloat16 and pay(call, shapes) and too_small.outweighs(call, shapes, _SAVED)
