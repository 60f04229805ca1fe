"""1x1 convolutions of a training step by the package's own product: where it is taken, and that all give the same."""

import math

import pytest
import torch
from torch.nn import functional as F

from resnet_fused.backends import bounds
from resnet_fused.library import status
from resnet_fused.steps import Conv, conv, own_product

pytestmark = pytest.mark.skipif(not status().cpu.loaded, reason="the op is compiled")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Taken as on a CPU without AVX-512, however few pixels."""
    torch.manual_seed(0)
    monkeypatch.setattr(own_product, "IS_FAST", True)
    monkeypatch.setattr(own_product, "LEAST_PIXELS", 0)


@pytest.fixture
def asked(monkeypatch):
    """The ops that are run."""
    seen, run = [], own_product.run
    monkeypatch.setattr(own_product, "run", lambda op, *args, **kwargs: seen.append(op) or run(op, *args, **kwargs))
    return seen


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


SHAPES = [(2, 65, 3, 5, 33), (1, 1, 1, 1, 1), (3, 3, 7, 2, 64), (2, 64, 9, 9, 17), (0, 8, 4, 4, 8)]


def error(made, exact, like):
    """The largest error by that of ATen's convolution in float32, or by a rounding where that is less."""
    found = torch.finfo(torch.float32)
    least = found.eps * exact.abs().max().item() + found.tiny
    return (made - exact).abs().max().item() / max((like - exact).abs().max().item(), least)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("terms", ["nothing", "shift", "residual", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_as_exact_as_stocks(shape, terms, relu, asked):
    n, c, h, w, k = shape
    x, weight = channels_last(n, c, h, w), torch.randn(c, k, 1, 1).transpose(0, 1)  # as gradients read one
    shift = torch.randn(k) if terms in ("shift", "both") else None
    residual = channels_last(n, k, h, w) if terms in ("residual", "both") else None

    def stock(dtype):
        y = F.conv2d(x.to(dtype), weight.to(dtype), None if shift is None else shift.to(dtype))
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y

    out = own_product.add_relu(x, weight, shift, residual, Conv(), relu, "auto")
    there = torch.zeros_like(out) if residual is None else residual.clone(memory_format=torch.preserve_format)
    own_product.add_relu_(there, x, weight, shift, Conv(), relu, "auto")
    assert asked == ["conv_norm_add_relu", "conv_norm_add_relu_"]
    assert out.is_contiguous(memory_format=torch.channels_last)
    for made in (out, there):
        if made.numel():
            assert error(made.double(), stock(torch.float64), stock(torch.float32).double()) <= 2


def test_nan_passes_the_relu_and_no_old_bound_is_kept():
    x, out = channels_last(1, 4, 2, 2), channels_last(1, 4, 2, 2)
    x[0, 1, 1, 0] = math.nan
    with bounds.private():
        bounds.remember(out, 1.0)
        own_product.add_relu_(out, x, torch.ones(4, 4, 1, 1), None, Conv(), True, "auto")
        assert bounds.noted(out) == math.inf
    assert out[0, :, 1, 0].isnan().all() and int(out.isnan().sum()) == 4


X, WEIGHT = (2, 8, 6, 6), (16, 8, 1, 1)
OTHERS = {
    "strided": ((X, WEIGHT, Conv((2, 2))), {}),
    "padded": ((X, WEIGHT, Conv(padding=(1, 1))), {}),
    "3x3": ((X, (16, 8, 3, 3), Conv(padding=(1, 1))), {}),
    "another backend": ((X, WEIGHT, Conv()), {"backend": "reference"}),
    "contiguous images": ((X, WEIGHT, Conv()), {"layout": torch.contiguous_format}),
    "float64": ((X, WEIGHT, Conv()), {"dtype": torch.float64}),
    "bfloat16": ((X, WEIGHT, Conv()), {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_all_else_is_left_to_others(case):
    (shape, weight, geometry), given = OTHERS[case]
    dtype, layout = given.get("dtype", torch.float32), given.get("layout", torch.channels_last)
    x, weight = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout), torch.randn(weight, dtype=dtype)
    assert not own_product.pays(x, weight, geometry, given.get("backend", "auto"))


def test_what_was_measured_to_lose_is_left(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(own_product, "IS_FAST", True)
    narrow, wide = torch.randn(8, 8, 1, 1), torch.randn(8, 1024, 1, 1)
    assert own_product.pays(channels_last(8, 8, 40, 40), narrow, Conv(), "auto")
    assert not own_product.pays(channels_last(7, 8, 40, 40), narrow, Conv(), "auto")
    assert not own_product.pays(channels_last(8, 1024, 40, 40), wide, Conv(), "auto")


def test_few_pixels_are_added_by_a_plain_product(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(conv, "HAS_AVX512", False)
    monkeypatch.setattr(own_product.torch.backends.mkl, "is_available", lambda: True)
    weight = torch.randn(8, 8, 1, 1)
    assert conv._is_added_product(channels_last(7, 8, 40, 40), weight, "auto")
    assert not conv._is_added_product(channels_last(8, 8, 40, 40), weight, "auto")
    assert not conv._is_added_product(channels_last(7, 8, 40, 40).double(), weight.double(), "auto")


def test_the_gradients_input_of_a_convolution_takes_it(asked, monkeypatch):
    monkeypatch.setattr(conv, "HAS_AVX512", False)
    grad, x, weight = channels_last(2, 16, 6, 6), channels_last(2, 8, 6, 6), torch.randn(16, 8, 1, 1)
    made, _ = conv.gradients(grad, x, weight, Conv(), "auto", (True, False))
    added, _ = conv.gradients(grad, x, weight, Conv(), "auto", (True, False), x.clone())
    assert asked == ["conv_norm_add_relu", "conv_norm_add_relu_"]
    exact = F.conv_transpose2d(grad.double(), weight.double())
    torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(added.double(), exact + x, rtol=1e-5, atol=1e-5)
