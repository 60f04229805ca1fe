"""The CPU that `plan/too_small.py` draws its limit for, wherever tests run."""

from __future__ import annotations

import pytest
import torch

from resnet_fused.plan import too_small
from resnet_fused.steps import conv


def assume(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512, plain products as fast as oneDNN's, and a cache of 1 MB."""
    for module in (too_small, conv):
        monkeypatch.setattr(module, "HAS_AVX512", True)
        monkeypatch.setattr(module, "SLOW_PRODUCTS", False)
    monkeypatch.setattr(too_small, "cache_bytes", lambda: 1 << 20)


def image(n: int = 2) -> torch.Tensor:
    """Of 8 channels, small enough."""
    torch.manual_seed(1)
    return torch.randn(n, 8, 6, 6)
