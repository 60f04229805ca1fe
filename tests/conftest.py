"""Fixtures for all tests."""

import pytest

from resnet_fused.blocks import plan


@pytest.fixture(autouse=True)
def fused_at_any_size(request):
    """Small inputs are what tests are made of: they are fused all the same, but for tests marked ``plans_small``."""
    if "plans_small" in request.keywords:
        yield
        return
    with plan.fusing_all():
        yield
