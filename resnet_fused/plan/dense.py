"""How a dense block runs: on one buffer where there are kernels for it, else as stock."""

from __future__ import annotations

from ..backends import soundness
from ..steps.batch_norm import pixels
from ..steps.dense import POINTWISE, THREE, DenseBlock
from ..steps.directions import Lowered
from ..steps.program import Call
from . import choose

#: Values per channel below which, on a CPU, Python and the packing of weights take longer than what fusion saves: on a
#: 2-core EPYC with AVX-512, blocks of 6 to 24 layers ran at 0.6 to 0.8 of stock's speed with 16 of them, at 1.06 to 1.3
#: with 98, in training and in evaluation (not recorded).
FEW = 64


def lower(call: Call) -> tuple[Lowered, str]:
    """The steps of a dense block, none where it is stock's; and why."""
    reason = _obstacle(call)
    steps = None if reason else (DenseBlock(call.program.output),)
    return Lowered(call.program, steps), reason


def _obstacle(call: Call) -> str:
    program, x = call.program, call.x
    for i, (_, node, own) in enumerate(call.convolutions):
        wanted, size = (THREE, (3, 3)) if i % 2 else (POINTWISE, (1, 1))
        if node.conv != wanted or tuple(own.weight.shape[2:]) != size or own.bias is not None:
            return "a layer that is not a 1x1 and a 3x3 convolution without bias"
    if program.backend == "reference":
        return ""
    few = pixels(x.shape) < FEW and not choose.on_gpu(x)
    if few and program.backend == "auto" and not choose.fuses_all():
        return "too small to gain"
    missing = choose.lacking(DenseBlock(program.output).ops(program), x, program.backend)
    if missing:
        return f"no sound kernel of {missing}"
    where, name = choose.place_of(x), program.backend
    weights = [own.weight for _, _, own in call.convolutions][::2]
    wide = (soundness.too_wide("dense_conv1x1_backward", *weight.shape[:2], where, name) for weight in weights)
    return next((f"dense_conv1x1_backward {reasons[0]}" for reasons in wide if reasons), "")
