"""The ops that stand in compiled graphs."""

import pytest
import torch

from resnet_fused.backends import opaque, run
from resnet_fused.ops import OPS


def schema(op):
    return getattr(getattr(torch.ops, opaque.NAMESPACE), op).default._schema


@pytest.mark.parametrize("op", OPS)
def test_the_compiler_gets_no_argument_of_its_own_by_name(op):
    """Inductor passes on by name what equals its default, to a function whose first argument is `kernel`."""
    named = [argument for argument in schema(op).arguments if argument.name == "kernel"]
    assert not any(argument.has_default_value() for argument in named)
    assert [argument.name for argument in schema(op).arguments][-1] == "backend"


def test_windows_are_given_by_position():
    x, scale = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last), torch.ones(8)
    found = getattr(torch.ops, opaque.NAMESPACE).norm_relu_avg_pool(
        x, scale, scale, [2, 2], [2, 2], backend="reference"
    )
    torch.testing.assert_close(found, run("norm_relu_avg_pool", x, scale, scale, backend="reference"))
