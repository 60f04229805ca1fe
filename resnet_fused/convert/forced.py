"""Whether every fused module is to run its stock forward."""

from __future__ import annotations

import contextlib

from ..plan.choose import setting


class _Settings:
    """Process-wide: a plain attribute is what ``torch.compile`` can guard on."""

    stock = False


_settings = _Settings()


def stock_forward() -> contextlib.AbstractContextManager[None]:
    """Run every fused module's stock forward within a ``with`` block: how to compare without a second model."""
    return setting(_settings, "stock", True)


def is_stock_forced() -> bool:
    """Whether a :func:`stock_forward` block is open."""
    return _settings.stock
