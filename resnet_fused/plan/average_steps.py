"""How average pools run: of a norm in one pass, of a tensor, or before the 1x1 convolution that they stand behind."""

from __future__ import annotations

from collections.abc import Callable

from ..steps.average import AverageConvolve, AverageValue
from ..steps.program import Averaging, Call, Convolution, Normalisation
from . import averages, cpu_values


def step(
    call: Call, value: int, node: Averaging, on_value: Callable[[int], bool] | None
) -> AverageValue | AverageConvolve:
    """The step of the average that makes `value`.

    `on_value`: of a convolution, whether it applies a norm on load; None: all are on tensors.
    """
    program, shapes = call.program, call.shapes()
    before = program.maker(node.source)
    if isinstance(before, Convolution):
        if not averages.comes_first(call, shapes, node.source):
            return AverageValue(value)
        if on_value is None and cpu_values.pay_averaged(call, node.source, shapes[value]):
            # a program that begins with a norm of the batch: so, likely, does what reads its output
            return AverageConvolve(value, True, program.meets_batch(0))
        return AverageConvolve(value, on_value is not None and on_value(node.source))
    if not isinstance(before, Normalisation) or not node.average.is_whole(shapes[node.source]):
        return AverageValue(value)
    others = [reader for reader in program.readers(node.source) if reader != value]
    are_values = [on_value and isinstance(program.maker(reader), Convolution) and on_value(reader) for reader in others]
    return AverageValue(value, all(are_values), not others)
