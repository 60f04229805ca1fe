"""Fixtures for all tests."""

import pytest

from resnet_fused.plan import choose


@pytest.fixture(autouse=True)
def fused_at_any_size(request):
    """Small inputs are what tests are made of: they are fused all the same, but for tests marked ``plans_small``."""
    if "plans_small" in request.keywords:
        yield
        return
    with choose.fusing_all():
        yield
