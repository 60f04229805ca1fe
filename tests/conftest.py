"""Fixtures for all tests."""

import contextlib

import pytest

from resnet_fused.plan import choose
from resnet_fused.testing.vision import import_torchvision

with contextlib.suppress(ImportError, RuntimeError):
    import_torchvision()  # before timm imports it, in whatever order the tests of a process come


def pytest_collection_modifyitems(items):
    """Minutes of Triton's kernels come first: begun last, they would leave the other processes waiting at the end."""
    items.sort(key=lambda item: item.path.parent.name != "triton")


@pytest.fixture(autouse=True)
def fused_at_any_size(request):
    """Small inputs are what tests are made of: they are fused all the same, but for tests marked ``plans_small``."""
    if "plans_small" in request.keywords:
        yield
        return
    with choose.fusing_all():
        yield
