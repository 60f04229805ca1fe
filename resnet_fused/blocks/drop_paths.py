"""Stochastic depth in other people's blocks: the factor for each sample that a drop path draws, as it draws it.

What a drop path does to a branch is a product with one number a sample: 0, or what makes up for the zeros. A program
takes these numbers into its addition, where they cost no pass, and norms see all samples, as in stock.

A block that is dropped for all of a batch is computed all the same. In training its norms' running statistics move with
every batch; where they do not (frozen, or without running statistics), its parameters' gradients are zeros, and both
these and the output are NaN where the branch is not finite: 0 times infinity. Only who computes the branch knows. In
evaluation nothing is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import proven


class Settings(NamedTuple):
    """What a drop path is set to."""

    p: float  # probability of dropping
    rows: bool  # a draw for each sample, or one for all
    scaled: bool  # whether what survives is divided by the probability that it does


def is_one(module: nn.Module | None) -> bool:
    """Whether `module` is a drop path whose random call this package repeats: timm's, torchvision's or ours."""
    return proven.kind(module) in proven.DROP_PATHS


def _settings(drop: nn.Module) -> Settings:
    if hasattr(drop, "drop_prob"):  # timm's
        return Settings(drop.drop_prob, True, drop.scale_by_keep)
    return Settings(drop.p, drop.mode == "row", True)


def why_not(drop: nn.Module) -> str:
    """Why a drop path must be called itself: for the error that it raises; empty if it need not."""
    if getattr(drop, "mode", "row") not in ("row", "batch"):
        return f"a drop path of mode {drop.mode!r}"
    p = _settings(drop).p
    return "" if p is not None and 0 <= p <= 1 else f"a drop path with probability {p}"


def draws(drop: nn.Module | None) -> bool:
    """Whether `drop` does anything."""
    return drop is not None and drop.training and _settings(drop).p != 0


def drawn(drop: nn.Module | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The factors ``[N]`` of the samples in `x` that `drop` draws for a branch of `dtype`; None where it does nothing.

    Its random call, its scaling: in number, shape and dtype.
    """
    if not draws(drop):
        return None
    settings, samples = _settings(drop), x.shape[0]
    keep = 1 - settings.p
    factor = x.new_empty((samples if settings.rows else 1, 1, 1, 1), dtype=dtype).bernoulli_(keep)
    if keep > 0 and settings.scaled:
        factor.div_(keep)
    return factor.view(-1) if settings.rows else factor.view(1).repeat(samples)
