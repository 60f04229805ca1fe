"""The step of a whole stem in evaluation on a CPU, where :mod:`.stem` has its convolution."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .evaluation_flow import Evaluation, ForwardStep
from .folding import Part
from .spec import Conv


@dataclasses.dataclass(frozen=True, kw_only=True)
class StemPool(ForwardStep):
    """The convolution of `main`, its norm with ReLU, and the max pool that makes `value`, in one pass over the image.

    Nothing is made of the weight, and only the pooled tensor is written.
    """

    ops: ClassVar[tuple[str, ...]] = ("conv_norm_relu_pool",)
    word = "convolution of few channels and pool in one pass"
    normed: ClassVar[bool] = True

    main: Part
    conv: Conv

    def forward(self, e: Evaluation, made: None) -> None:
        pool, x, weight = e.program.maker(self.value).pool, e.values[self.source], e.own(self.main.conv).weight
        arguments = (x, weight, *e.behind(self.main), self.conv.stride, self.conv.padding, *pool.args)
        e.values[self.value] = e.run("conv_norm_relu_pool", *arguments)
