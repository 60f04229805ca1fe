"""A convolution and its gradients by whoever is fastest, on CPUs with and without AVX-512: all give the same."""

import pytest
import torch
from torch.nn import functional as F

from resnet_fused.steps import Conv, conv

CASES = {
    "few pixels, many channels": ((2, 64, 3, 3), (48, 64, 1, 1), Conv()),
    "many pixels": ((2, 8, 12, 12), (6, 8, 1, 1), Conv()),
    "into many channels from few": ((2, 256, 4, 4), (8, 256, 1, 1), Conv()),
    "as many channels as before": ((2, 64, 3, 3), (64, 64, 1, 1), Conv()),
    "strided, few": ((1, 64, 7, 5), (64, 64, 1, 1), Conv((2, 2))),
    "strided, many": ((2, 6, 9, 9), (4, 6, 1, 1), Conv((2, 2))),
    "one channel": ((3, 1, 2, 2), (1, 1, 1, 1), Conv()),
    "one pixel": ((1, 65, 1, 1), (3, 65, 1, 1), Conv()),
    "3x3, few pixels": ((1, 32, 4, 4), (32, 32, 3, 3), Conv(padding=(1, 1))),
    "3x3, many pixels": ((2, 16, 14, 14), (8, 16, 3, 3), Conv(padding=(1, 1))),
    "3x3, many channels": ((2, 40, 7, 9), (33, 40, 3, 3), Conv(padding=(1, 1))),
    "3x3, many channels, no padding": ((2, 40, 8, 9), (33, 40, 3, 3), Conv()),
    "3x3, strided": ((1, 40, 7, 7), (33, 40, 3, 3), Conv((2, 2), (1, 1))),
    "grouped": ((2, 32, 4, 4), (32, 8, 3, 3), Conv(padding=(1, 1), groups=4)),
    "padded 1x1": ((2, 64, 3, 3), (64, 64, 1, 1), Conv(padding=(1, 1))),
}


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=[False, True], ids=["without", "with"], autouse=True)
def avx512(request, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(conv, "HAS_AVX512", request.param)
    monkeypatch.setattr(conv, "SLOW_PRODUCTS", False)
    return request.param


def close(ours, exact, name):
    """Both are sums of float32 products; stock's own error here is about 1e-6."""
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item(), msg=name)


@pytest.mark.parametrize("large", [1 << 19, 1], ids=["small weights", "large weights"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, layout, large, monkeypatch):
    monkeypatch.setattr(conv, "_LARGE_WEIGHT", large)
    shape, weight_shape, geometry = CASES[case]
    x, weight = channels_last(*shape), torch.randn(weight_shape).contiguous(memory_format=layout)
    exact_x, exact_w = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.conv2d(exact_x, exact_w, None, *geometry.args)
    out, _ = conv.conv2d(x, weight, None, geometry, "auto")
    close(out, exact, "output")
    assert out.is_contiguous(memory_format=torch.channels_last)
    grad, there = channels_last(*out.shape), channels_last(*shape)
    grad_x, grad_w = torch.autograd.grad(exact, (exact_x, exact_w), grad.double())
    close(conv.gradients(grad, x, weight, geometry, "auto", (False, True))[1], grad_w, "weight")
    close(conv.gradients(grad, x, weight, geometry, "auto", (True, False))[0], grad_x, "input")
    for add_to in (None, there):
        base = 0 if add_to is None else add_to.double()
        alone = conv.gradients(
            grad, x, weight, geometry, "auto", (True, False), None if add_to is None else add_to.clone()
        )[0]
        close(alone, grad_x + base, "input, added")
        ours_x, ours_w = conv.gradients(grad, x, weight, geometry, "auto", add_to=add_to)
        close(ours_w, grad_w, "weight, with the input's")
        close(ours_x, grad_x + base, "input, with the weight's")
        if add_to is not None:
            assert ours_x.data_ptr() == add_to.data_ptr()


def test_products_are_taken_where_they_are_faster(avx512, monkeypatch):
    seen, convolution = [], conv.aten.convolution
    monkeypatch.setattr(conv.aten, "convolution", lambda *args: seen.append(1) or convolution(*args))
    conv.conv2d(channels_last(1, 64, 3, 3), torch.randn(64, 64, 1, 1), None, Conv(), "auto")
    assert bool(seen) != avx512


def test_fewer_products_are_taken_where_they_are_slow(avx512, monkeypatch):
    monkeypatch.setattr(conv, "SLOW_PRODUCTS", True)
    weight, like, pointwise = torch.randn(64, 64, 1, 1), torch.randn(1, 64, 1, 1), Conv()
    assert not conv.is_product(9, weight, pointwise, like)
    assert conv.is_product(8, weight, pointwise, like) is avx512


@pytest.mark.parametrize(("slow", "most"), [(True, 8), (False, 64)])
def test_fewer_weight_gradients_are_ours_where_vectors_of_256_bits_are_slow(avx512, slow, most, monkeypatch):
    """Of a 3x3 convolution of 512 channels at 7x7, batch 8, on a Zen 5: ours took 9.6 ms, ATen's 4.8."""
    seen, run = [], conv.run
    monkeypatch.setattr(conv, "SLOW_PRODUCTS", slow)
    monkeypatch.setattr(conv, "run", lambda op, *args, **options: seen.append(op) or run(op, *args, **options))
    weight, geometry = torch.randn(64, 64, 3, 3), Conv(padding=(1, 1))
    for pixels in (most, most + 1):
        conv.gradients(
            channels_last(1, 64, 1, pixels), channels_last(1, 64, 1, pixels), weight, geometry, "auto", (False, True)
        )[1]
    assert seen == ["conv_weight_grad"] * avx512


@pytest.mark.parametrize(
    ("shape", "ours"),
    [((64, 64, 3, 3), True), ((32, 64, 3, 3), True), ((64, 32, 3, 3), False), ((64, 64, 5, 5), False)],
)
def test_weight_gradients_of_many_channels_are_ours_without_avx512(avx512, shape, ours, monkeypatch):
    seen, run, geometry = [], conv.run, Conv(stride=(2, 2), padding=(shape[2] // 2, shape[2] // 2))
    monkeypatch.setattr(conv, "run", lambda op, *args, **options: seen.append(op) or run(op, *args, **options))
    grad, x = channels_last(1, shape[0], 16, 16), channels_last(1, shape[1], 32, 32)
    conv.gradients(grad, x, torch.randn(shape), geometry, "auto", (False, True))
    assert seen == ["conv_weight_grad"] * (ours and not avx512)


@pytest.mark.parametrize(
    ("vendor", "family", "slow"),
    [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("GenuineIntel", 26, False), (None, None, False)],
)
def test_processors_on_which_plain_products_are_slow(tmp_path, vendor, family, slow):
    file = tmp_path / "cpuinfo"
    if vendor is not None:
        told = "processor\t: {}\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 2\nflags\t: a: b\n\n"
        file.write_text(told.format(0, vendor, family) + told.format(1, "other", 1))
        read = conv.cpu_info(str(file))
        assert (read["cpu family"], read["model"], read["flags"]) == (str(family), "2", "a: b")
    assert conv.products_are_slow(conv.cpu_info(str(file))) is slow
