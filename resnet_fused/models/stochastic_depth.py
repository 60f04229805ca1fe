"""Stochastic depth: a block's branch is left out at random in training, for each sample or for all of a batch.

Paper: Huang, Sun, Liu, Sedra, Weinberger, "Deep Networks with Stochastic Depth" (2016),
https://arxiv.org/abs/1603.09382. What differs: the paper scales a branch by its survival probability in evaluation and
drops it for the whole batch; here, as in torchvision and timm, what survives is divided by that probability in
training, evaluation is the network as it stands, and each sample draws for itself unless ``mode="batch"``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MODES = ("row", "batch")
#: The paper's setting, as options of a network: linear decay to a survival probability of 0.5, a draw for a batch.
HALF = {"stochastic_depth_rate": 0.5, "stochastic_depth_mode": "batch"}


class StochasticDepth(nn.Module):
    """Zero its input with probability `p` and divide it by ``1 - p`` otherwise; in evaluation, nothing.

    Makes the random draws of ``torchvision.ops.StochasticDepth``, in number, shape and dtype, so that one seed gives
    both the same result.

    Args:
        p: probability of zeroing.
        mode: ``"row"``, one draw for each sample, or ``"batch"``, one for all of the batch.

    Raises:
        ValueError: `p` is not in [0, 1], or `mode` is another word.
    """

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"StochasticDepth: p, the probability of dropping, must be in [0, 1], got {p}")
        if mode not in MODES:
            raise ValueError(f"StochasticDepth: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        self.p = p
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        survival = 1.0 - self.p
        size = [1] * x.ndim
        if self.mode == "row":
            size[0] = x.shape[0]
        factor = torch.empty(size, dtype=x.dtype, device=x.device).bernoulli_(survival)
        if survival > 0:
            factor.div_(survival)
        return x * factor

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"


def linear_decay(rate: float, blocks: int) -> list[float]:
    """The probability of dropping each of so many blocks: ``rate * l / blocks`` of block ``l``, counted from 1.

    The paper's rule with ``rate = 1 - p_L``: early blocks, which later ones build on, survive more often.

    Raises:
        ValueError: `rate` is not in [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(
            f"stochastic_depth_rate, the probability of dropping the last block, must be in [0, 1] so that survival "
            f"probabilities are, got {rate}"
        )
    return [rate * block / blocks for block in range(1, blocks + 1)]
