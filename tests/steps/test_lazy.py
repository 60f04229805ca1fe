"""Lazy gradients, written down."""

import pytest
import torch

from resnet_fused.ops.contract import channels_last, per_channel, per_sample
from resnet_fused.steps.batch_norm import Affine, Coefficients
from resnet_fused.steps.lazy import LazyGrad

F64 = torch.float64


def data():
    return channels_last(torch.randn(3, 6, 5, 4, dtype=F64))


@pytest.mark.parametrize("into_g", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_materialised_gradient_has_the_residual_added(joined, into_g):
    torch.manual_seed(0)
    g, z, residual = data(), data(), data() if joined else None
    a, b, d, scale, shift = torch.randn(5, 6, dtype=F64)
    c, bn = Coefficients(a, b, d, d, d), Affine(shift, scale, scale, shift)
    factor = torch.tensor([0.0, 2.0, 2.0], dtype=F64)
    value = LazyGrad(g, z, c, bn, relu=True, sample_factor=factor)
    kept = torch.where(per_channel(scale) * z + per_channel(shift) > 0, g, 0)
    expected = per_channel(a) * per_sample(factor) * kept + per_channel(b) * z + per_channel(d)
    expected = expected + residual if joined else expected
    before = g.clone()
    got = value.materialise("auto", into_g, residual=residual)
    torch.testing.assert_close(got, expected)
    assert got.stride() == g.stride()
    assert (got is g) == into_g and (into_g or torch.equal(g, before))
