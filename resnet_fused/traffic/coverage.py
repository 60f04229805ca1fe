"""How many of the binaries that a model's step starts are run by the cases that judge them."""

from __future__ import annotations

import torch

from ..backends import cards
from ..backends import triton as room
from ..backends.selfcheck import configurations
from .calls import Call


class Coverage:
    """Counts, call by call."""

    def __init__(self, card: cards.Card) -> None:
        self.card = card
        self.configurations: set[tuple[str, str]] = set()
        self.wanted: set[tuple] = set()  # binaries that calls start
        self.run: set[tuple] = set()  # of them, those that their cases start

    def add(self, call: Call) -> bool:
        """Count a call; whether its configuration is new, and its op one of Triton's."""
        if room.missing_triton() or call.op not in room.kernels():
            return False
        kernel, args = room.kernels()[call.op], call.args
        wanted = configurations.of_call(kernel, args, {}, self.card)
        if (call.op, wanted.digest) in self.configurations:
            return False
        self.configurations.add((call.op, wanted.digest))
        self.wanted |= wanted.binaries
        whole = configurations.problem(call.op, args, {})
        for candidate in configurations.covering(kernel, whole, wanted, self.card):
            started = kernel.launches(*candidate.problem.meta(), candidate.card)
            self.run |= wanted.binaries & {launch.binary for launch in started}
        return True

    def text(self, model: str, device: torch.device, ran: bool) -> str:
        """One paragraph on what was counted."""
        counts = f"{len(self.run)} of the {len(self.wanted)} Triton kernels that a step of {model} starts"
        what = "were checked" if ran else f"would be checked, but none runs on {device}"
        return f"{counts}, in {len(self.configurations)} kinds of calls, {what}.\n"
