"""What was chosen, in words: what ``explain`` says of a block."""

from __future__ import annotations

from ..steps import Chain
from ..steps.kinds import Convolve, ConvolveAndAdd, Join, Normalise
from ..steps.program_node import Lowered
from ..steps.value_kinds import ConvolveValue, ConvolveValueAdd

_STEPS = {
    Convolve: "convolution",
    ConvolveAndAdd: "convolution and sum",
    ConvolveValue: "1x1 on values",
    ConvolveValueAdd: "1x1 on values that adds",
    Normalise: "norm on load",
    Join: "norm, add and ReLU in one pass",
}


def of_chain(chain: Chain) -> str:
    """The variant of `chain`."""
    if chain.stock:
        return "stock"
    kind = {True: "Gram join", False: "plain join"}
    text = ("lazy, " if chain.lazy else "") + kind[chain.gram]
    return text + (f", shortcut {kind[chain.gram_shortcut]}" if chain.shortcut is not None else "")


def of_steps(lowered: Lowered) -> str:
    """The steps of a program, equal ones once."""
    return ", ".join(dict.fromkeys(_STEPS[type(step)] for step in lowered.steps))
