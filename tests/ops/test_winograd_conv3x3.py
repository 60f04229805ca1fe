"""The 3x3 convolution by minimal filtering beside ATen's: errors, zeros, what is not finite, threads, bad arguments."""

import pytest
import torch
from torch.nn import functional as F

from resnet_fused.backends import backends
from resnet_fused.library import status
from resnet_fused.ops import OPS
from resnet_fused.ops.contract import channels_last

pytestmark = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")
SHAPES = {"blocks": (2, 64, 29, 31), "panels": (3, 96, 7, 7), "rest of a vector": (2, 37, 12, 13)}


def convolve(*args):
    return torch.ops.resnet_fused.winograd_conv3x3(*args)


def gradient(grad, weight, padding):
    """Stock's, of a convolution's input."""
    grows = 2 - 2 * padding
    x = torch.empty(grad.shape[0], weight.shape[1], *(size + grows for size in grad.shape[2:]), dtype=grad.dtype)
    arguments = ([1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False])
    return torch.ops.aten.convolution_backward(grad, channels_last(x), weight, None, *arguments)[0]


def drawn(shape, outputs):
    torch.manual_seed(0)
    n, c, h, w = shape
    weight = channels_last(torch.randn(outputs, c, 3, 3) / (9 * c) ** 0.5)
    return channels_last(torch.randn(shape)), weight, channels_last(torch.randn(n, outputs, h, w))


def values(kind, t):
    """Activations as a net has them, from normal deviates."""
    return {
        "normal": lambda: t,
        "after a relu": lambda: t.relu(),
        "far mean": lambda: t + 100,
        "sparse": lambda: torch.where(t > 1.5, t, 0),
        "huge and tiny": lambda: t * 10.0 ** (8 * torch.randn_like(t)).clamp(-12, 12).round(),
    }[kind]()


def root_mean_square(error):
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("kind", "most"),
    [("normal", 0.8), ("after a relu", 0.95), ("far mean", 0.6), ("huge and tiny", 1.25), ("sparse", 1.75)],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_less_exact_than_stock(shape, kind, most):
    """`most`: root mean square of the error by that of stock's. A sum of few values that are not 0 has few roundings.

    The largest error of thousands of values is never above stock's, but for luck.
    """
    x, weight, grad = drawn(shape, 64)
    x, grad = channels_last(values(kind, x)), channels_last(values(kind, grad))
    pairs = [
        (convolve(x, weight)[0], F.conv2d(x, weight, padding=1), F.conv2d(x.double(), weight.double(), padding=1)),
        (convolve(grad, weight, 1, True)[0], gradient(grad, weight, 1), gradient(grad.double(), weight.double(), 1)),
    ]
    for ours, stock, exact in pairs:
        ours, stock = ours.double() - exact, stock.double() - exact
        assert root_mean_square(ours) <= most * root_mean_square(stock)
        assert ours.abs().max() <= 1.1 * stock.abs().max()


@pytest.mark.parametrize(("kind", "most"), [("normal", 2.2), ("after a relu", 2.5), ("far mean", 1.0)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_errors_of_larger_tiles(shape, kind, most):
    """By root mean square; statistics are those of what was written."""
    x, weight, grad = drawn(shape, 64)
    x, grad = channels_last(values(kind, x)), channels_last(values(kind, grad))
    (z, mean, m2), back = convolve(x, weight, 1, False, True, 4), convolve(grad, weight, 1, True, False, 4)[0]
    exact = F.conv2d(x.double(), weight.double(), padding=1), gradient(grad.double(), weight.double(), 1)
    stock = F.conv2d(x, weight, padding=1), gradient(grad, weight, 1)
    for ours, theirs, wanted in zip((z, back), stock, exact, strict=True):
        assert 0 < root_mean_square(ours.double() - wanted) <= most * root_mean_square(theirs.double() - wanted)
    wanted = OPS["bn_stats"].reference(z.double())[:2]
    torch.testing.assert_close(mean.double(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2.double(), wanted[1], rtol=1e-5, atol=1e-6)


def test_patches_of_zeros_give_zeros_beside_values_in_the_same_tile():
    x, weight, _ = drawn((2, 32, 14, 15), 48)
    x[:, :, 3:10, 2:9] = 0
    stock = F.conv2d(x, weight, padding=1)
    assert (stock == 0).any()
    assert torch.equal(convolve(x, weight)[0] == 0, stock == 0)


def kinds(t):
    """Where NaN and the two infinities stand."""
    return [t.isnan(), t == torch.inf, t == -torch.inf]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("tile", [2, 4])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock(tile, padding, where, value):
    """Corners, edges and the middle of a tile; in a weight a tap that padding hides from some outputs."""
    x, weight, grad = drawn((2, 40, 9, 10), 24)
    if where == "weight":
        weight[5, 3, 0, 2] = weight[9, 0, 1, 1] = value
    else:
        for t in (x, grad):
            t[0, 3, 0, 0] = t[1, 7, 4, 5] = t[1, 20, 8, 3] = value
    ours, stock = convolve(x, weight, padding, False, True, tile), F.conv2d(x, weight, padding=padding)
    assert all(map(torch.equal, kinds(ours[0]), kinds(stock)))
    mean, m2 = OPS["bn_stats"].reference(stock)[:2]
    if value != 3e38:  # whose sum may be too large for float32, and is in no fixed order
        assert torch.equal(ours[1].isfinite(), mean.isfinite()) and torch.equal(ours[2].isfinite(), m2.isfinite())
    back, wanted = convolve(grad, weight, padding, True, False, tile)[0], gradient(grad, weight, padding)
    assert all(map(torch.equal, kinds(back), kinds(wanted)))


def test_a_transform_that_overflows_where_the_direct_sum_does_not():
    """Four values of 1e38 in one sum of the input's transform, in the weight a single tap."""
    x = channels_last(torch.full((1, 32, 6, 6), 1e38))
    weight = torch.zeros(32, 32, 3, 3)
    weight[:, :, 1, 1] = 1 / 64
    for ours in (convolve(x, weight, 1, False, True), convolve(x, weight, 1, True, True)):
        torch.testing.assert_close(ours[0], torch.full_like(x, 5e37))
        torch.testing.assert_close(ours[1], torch.full((32,), 5e37))


@pytest.mark.parametrize(
    ("shape", "outputs"), [((5, 40, 29, 31), 64), ((2, 64, 7, 7), 160), ((1, 16, 3, 3), 16)], ids=str
)
def test_bits_do_not_depend_on_the_thread_count(shape, outputs):
    x, weight, grad = drawn(shape, outputs)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            more = [*convolve(x, weight, 1, False, True, 4), *convolve(grad, weight, 1, True, True, 4)]
            results.append([*convolve(x, weight, 1, False, True), *convolve(grad, weight, 1, True, True), *more])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_layout_of_the_weight_changes_no_bit():
    x, weight, grad = drawn((2, 40, 9, 8), 33)
    apart = torch.randn(2 * 33, 40, 3, 6)[::2, :, :, ::2].copy_(weight)
    for other in (weight.contiguous(), apart, weight.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(convolve(x, weight)[0], convolve(x, other)[0])
        assert torch.equal(convolve(grad, weight, 1, True)[0], convolve(grad, other, 1, True)[0])


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (lambda x, w: (x.contiguous(), w), r"x of shape \[2, 8, 4, 5\] is not channels_last"),
        (lambda x, w: (x.double(), w.double()), "got Double x and Double weight; pass Float"),
        (lambda x, w: (x, w.bfloat16()), "got Float x and BFloat16 weight; pass Float"),
        (lambda x, w: (x, w, 2), "padding is 2; pass 0 or 1"),
        (lambda x, w: (x, w, 1, False, False, 3), "outputs is 3; pass 2 or 4"),
        (lambda x, w: (x, w[:, :7]), r"weight has shape \[6, 7, 3, 3\]; pass \[K, 8, 3, 3\]"),
        (lambda x, w: (x, w, 1, True), r"weight has shape \[6, 8, 3, 3\]; pass \[8, C, 3, 3\]"),
        (lambda x, w: (x, w[..., :1]), r"weight has shape \[6, 8, 3, 1\]; pass \[K, 8, 3, 3\]"),
        (lambda x, w: (channels_last(x[:, :, :2]), w, 0), r"x of shape \[2, 8, 2, 5\] is smaller than the kernel"),
    ],
)
def test_argument_errors(args, text):
    x = channels_last(torch.randn(2, 8, 4, 5))
    with pytest.raises(RuntimeError, match=f"winograd_conv3x3: {text}"):
        convolve(*args(x, torch.randn(6, 8, 3, 3)))


def test_reasons_of_the_backend():
    cpu, x, weight = backends()["cpu"], channels_last(torch.randn(2, 8, 4, 4)), torch.randn(6, 8, 3, 3)

    def reasons(*args):
        return cpu.reasons("winograd_conv3x3", args, {})

    assert reasons(x, weight) == reasons(x, weight, 0) == []
    assert reasons(x, weight, 2) == ["takes a padding of 0 or 1, not 2"]
    assert reasons(x, weight[..., :1]) == ["takes 3x3 weights, not 3x1"]
    assert reasons(x, weight.double()) == ["takes a weight of the activations' dtype"]
    assert reasons(x.contiguous(), weight) == ["takes channels_last tensors only"]
    assert reasons(x.double(), weight.double()) == ["takes float32, not float64"]
