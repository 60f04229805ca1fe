"""What the Triton kernels take, whatever else a call has: their declarations, as far as they do not need Triton.

So that where Triton is missing a plan for a GPU that is not there is the one that would be made beside it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from ...ops import DATA_DTYPES, Op, conv1x1_backward, running_update
from ...ops.contract import is_channels_last
from .. import dense
from ..declaration import no_reasons
from . import checks

Tensor = torch.Tensor

# Of conv1x1_backward:
MOST_OUTPUTS = 256  # a program has all of them: so many channels fit into the registers, with the product they make
NARROW = 128  # on one side at least: where both are wider, arithmetic takes longer than a second read
MOST_COUPLED = 64, 128  # inputs, which a program then has to have all too, and outputs

# Of dense_conv1x1_backward:
MOST_BETWEEN = 256  # outputs, of which a program has all too


@dataclasses.dataclass(frozen=True)
class Limits:
    """Fields of a :class:`..declaration.Kernel`."""

    dtypes: tuple[torch.dtype, ...] = DATA_DTYPES
    unsupported: Callable = checks.unsupported
    widths: Callable = no_reasons


def narrow_weight(outputs: int, inputs: int, coupled: bool) -> list[str]:
    """Reasons against a weight of these sizes in `conv1x1_backward`."""
    most_inputs, most_outputs = MOST_COUPLED
    found = []
    if outputs > MOST_OUTPUTS:
        found.append(f"takes up to {MOST_OUTPUTS} output channels, not {outputs}")
    if min(outputs, inputs) > NARROW:
        found.append(f"takes up to {NARROW} channels on one side, not {outputs} and {inputs}")
    if outputs > NARROW and (outputs % 8 or inputs % 8):
        found.append(f"takes more than {NARROW} output channels if 8 divides all counts, not {outputs} and {inputs}")
    if coupled and (inputs > most_inputs or outputs > most_outputs):
        found.append(f"takes up to {most_inputs} input and {most_outputs} output channels under a coupling, "
                     f"not {inputs} and {outputs}")  # fmt: skip
    return found


def both_gradients(*args, **kwargs) -> list[str]:
    """Reasons against a call of `conv1x1_backward`."""
    call = conv1x1_backward.arguments(*args, **kwargs)
    reasons = narrow_weight(*call.weight.shape[:2], call.coupling is not None) if call.weight.dim() == 4 else []
    return reasons + checks.unsupported(*args, **kwargs)


def middle(outputs: int, inputs: int, coupled: bool = False) -> list[str]:
    """Reasons against a weight of these sizes in `dense_conv1x1_backward`."""
    return [f"takes up to {MOST_BETWEEN} output channels, not {outputs}"] if outputs > MOST_BETWEEN else []


def of_slices(op: str, widths: Callable, *args, **kwargs) -> list[str]:
    """Reasons against a call of an op of dense blocks."""
    parts = dense.parts(op, *args, **kwargs)
    reasons = dense.layout_reasons(parts)
    taps_fit = all(weight.is_contiguous() or is_channels_last(weight) for weight in parts.weights)
    if not taps_fit or not all(t.is_contiguous() for t in parts.vectors):
        reasons.append("takes dense weights and contiguous vectors only")
    data, vectors = (*parts.slices, *parts.dense, *parts.weights), parts.vectors
    if any(t.dtype != data[0].dtype for t in data) or any(t.dtype != torch.float32 for t in vectors):
        reasons.append("takes tensors and weights of one dtype and float32 vectors only")
    return reasons + [reason for weight in parts.weights for reason in widths(*weight.shape[:2])]


def plain_buffers(*args, **kwargs) -> list[str]:
    """Reasons against a call of `running_update`."""
    for update in running_update.split(args, kwargs)[0]:
        vectors = (update.running_mean, update.running_var, update.mean, update.var)
        if not all(t.dtype == torch.float32 and t.is_contiguous() and t.device == args[0].device for t in vectors):
            return ["takes contiguous float32 vectors on one device only"]
        counter = update.counter
        if counter is not None and (counter.dtype != torch.int64 or counter.dim() or counter.device != args[0].device):
            return ["takes int64 counters beside their norms only"]
    return []


_WIDTHS = {"dense_conv1x1_backward": middle}
_OTHERS = {
    # of float32, registers would hold half
    "conv1x1_backward": Limits((torch.bfloat16, torch.float16), both_gradients, narrow_weight),
    "running_update": Limits((torch.float32,), plain_buffers),
} | {
    op: Limits(unsupported=functools.partial(of_slices, op, widths), widths=widths)
    for op, widths in ((op, _WIDTHS.get(op, no_reasons)) for op in dense.PARTS)
}


def of(op: Op) -> Limits:
    """What the kernel of `op` takes: activations in channels_last, unless it says otherwise here."""
    return _OTHERS.get(op.name, Limits((torch.float32,), no_reasons) if op.vectors else Limits())
