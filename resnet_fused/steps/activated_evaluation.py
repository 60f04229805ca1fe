"""Steps of evaluation for activations other than ReLU; oneDNN's convolutions have them in their epilogue."""

from __future__ import annotations

import dataclasses

from ..backends import run
from ..ops import activation
from .evaluation_flow import Evaluation, ForwardStep
from .spec import Act


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormActPass(ForwardStep):
    """The :class:`Raw` `source` and the activation `act` behind it, written."""

    word = "pass with activation"
    normed = True
    ops = ("norm_act",)

    act: Act

    def forward(self, e: Evaluation, made: None) -> None:
        e.values[self.value] = run("norm_act", *e.values[self.source], *self.act.args, backend=e.backend)
        if e.bounds is not None:
            e.bounds[self.value] = e.bounds[self.source]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActPass(ForwardStep):
    """The activation `act` of a tensor that a step before made, in place."""

    word = "activation"

    act: Act

    def forward(self, e: Evaluation, made: None) -> None:
        e.values[self.value] = activation.value(e.values[self.source], *self.act.args, inplace=True)
