"""The weight gradient by Winograd's products beside ATen's: errors, what is not finite, threads, bad arguments."""

import pytest
import torch

from resnet_fused.backends import backends
from resnet_fused.library import status
from resnet_fused.ops import OPS
from resnet_fused.ops.contract import channels_last
from resnet_fused.steps import winograd_wgrad

pytestmark = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")

NAME = "winograd_conv3x3_wgrad"
stock = OPS[NAME].reference


def ours(*args):
    return torch.ops.resnet_fused.winograd_conv3x3_wgrad(*args)


def drawn(shape, outputs, padding=1):
    """Gradient, input and weight."""
    torch.manual_seed(0)
    n, c, h, w = shape
    grad = torch.randn(n, outputs, h + 2 * padding - 2, w + 2 * padding - 2)
    return channels_last(grad), channels_last(torch.randn(shape)), channels_last(torch.randn(outputs, c, 3, 3))


def sparse(t):
    return torch.where(t > 0.5, t, 0)


def decades(t):
    """Of 12 decades, all as frequent."""
    return t * 10.0 ** (12 * torch.rand_like(t) - 6)


def heavy(t):
    """Of so many decades that of a sum hardly more than one product counts."""
    return t * 10.0 ** (3 * torch.randn_like(t)).clamp(-9, 9)


KINDS = {
    "normal": lambda grad, x: (grad, x),
    "after a relu": lambda grad, x: (sparse(grad), x.relu()),
    "far mean": lambda grad, x: (grad + 10, x + 1000),
    "huge and tiny": lambda grad, x: (decades(grad), decades(x)),
}
#: From here on a step takes the op, for so many channels and images of such sizes. The last few are of few tiles.
SHAPES = [(2, 64, 40, 44), (8, 64, 14, 14), (16, 96, 7, 7), (8, 64, 15, 15), (4, 32, 33, 32)]
SHAPES += [(8, 64, 7, 7), (4, 96, 14, 14), (7, 64, 9, 9)]
SHAPES += [(4, 16, 33, 32), (8, 24, 23, 23)] if winograd_wgrad._PANEL == 16 else []


def errors(grad, x, weight):
    """Of ours and of stock's."""
    grad, x = channels_last(grad), channels_last(x)
    exact = stock(grad.double(), x.double(), weight.double())
    return [f(grad, x, weight).double() - exact for f in (ours, stock)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_less_exact_than_stock(kind, shape):
    """In the root mean square; 3% are for CPUs without FMA. The largest error is not above stock's but for luck."""
    grad, x, weight = drawn(shape, shape[1])
    own, theirs = errors(*KINDS[kind](grad, x), weight)
    assert own.norm() <= (1.1 if kind == "huge and tiny" else 1.03) * theirs.norm()
    assert own.abs().max() <= 1.25 * theirs.abs().max()


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_product_far_above_all_others_is_rounded_in_all_taps_of_its_tile(shape):
    """Stock rounds it in one tap, and sums of one product have no error. In nets all taps see the largest values."""
    grad, x, weight = drawn(shape, shape[1])
    own, theirs = errors(heavy(grad), heavy(x), weight)
    assert own.norm() <= 3 * theirs.norm()


def test_zeros_stay_zeros():
    grad, x, weight = drawn((4, 33, 12, 11), 40)
    grad[:, 3], x[:, 7] = 0, 0
    got = ours(grad, x, weight)
    assert torch.equal(got == 0, stock(grad, x, weight) == 0)
    assert (got[3] == 0).all() and (got[:, 7] == 0).all()


def kinds(t):
    """Where NaN and the two infinities stand."""
    return [t.isnan(), t == torch.inf, t == -torch.inf]


PIXELS = {"corner": (0, 0), "edge": (4, 0), "last row": (8, 3), "middle": (3, 4), "other place of a tile": (4, 5)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["grad", "x"])
@pytest.mark.parametrize("pixel", PIXELS.values(), ids=PIXELS)
@pytest.mark.parametrize("padding", [0, 1])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock(padding, pixel, where, value):
    grad, x, weight = drawn((2, 40, 11, 10), 24, padding)
    (grad if where == "grad" else x)[(1, 5, *pixel)] = value
    got, expected = ours(grad, x, weight, [padding] * 2), stock(grad, x, weight, [padding] * 2)
    assert not expected.isfinite().all()
    assert all(map(torch.equal, kinds(got), kinds(expected)))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("parts", [1, 3], ids=["one part", "parts"])
def test_infinity_times_zero_is_not_a_number(parts, layout):
    """Behind a ReLU whole tiles of one tensor are zeros while the other overflowed."""
    grad, x, weight = drawn((parts, 32, 36, 36), 32)
    grad[0, 4], x[0, 6, 17, 18] = 0, torch.inf
    weight = weight.contiguous(memory_format=layout)
    got, expected = ours(grad, x, weight), stock(grad, x, weight)
    assert expected[4, 6].isnan().any()
    assert all(map(torch.equal, kinds(got), kinds(expected)))
    assert got.stride() == weight.stride()


def test_a_transform_that_overflows_where_the_direct_sum_does_not():
    """Four values of 2e38 in one sum of the input's transform; and of the gradient's."""
    grad, x = (channels_last(torch.full((1, 32, 4, 4), value)) for value in (2e38, 1e-3))
    weight = torch.randn(32, 32, 3, 3)
    for args in ((grad, x, weight), (x, grad, weight)):
        got = ours(*args)
        assert got.isfinite().all()
        torch.testing.assert_close(got, stock(*args))


@pytest.mark.parametrize(
    ("shape", "outputs"), [((5, 40, 29, 31), 64), ((9, 200, 15, 15), 160), ((16, 64, 7, 7), 64)], ids=str
)
def test_bits_do_not_depend_on_the_thread_count(shape, outputs):
    args = drawn(shape, outputs)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16, 1):
            torch.set_num_threads(threads)
            results.append(ours(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_layout_of_the_weight_changes_no_bit():
    grad, x, weight = drawn((2, 40, 29, 31), 33)
    exchanged = torch.randn(40, 33, 3, 3).transpose(0, 1)
    expected = ours(grad, x, weight)
    for other in (weight.contiguous(), exchanged):
        got = ours(grad, x, other)
        assert got.stride() == other.stride() and torch.equal(got, expected)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (lambda g, x, w: (g.contiguous(), x, w), r"grad of shape \[2, 6, 4, 5\] is not channels_last"),
        (lambda g, x, w: (g, x.contiguous(), w), r"x of shape \[2, 8, 4, 5\] is not channels_last"),
        (lambda g, x, w: (g.double(), x.double(), w.double()), "got a tensor of Double; pass Float"),
        (lambda g, x, w: (g, x, w.bfloat16()), "got a tensor of BFloat16; pass Float"),
        (lambda g, x, w: (g, x, w, [-1, 1]), r"got padding \[-1, 1\]; pass two numbers, 0 or more"),
        (lambda g, x, w: (g, x, w, [0, 1]), r"a 3x3 convolution of x \[2, 8, 4, 5\] with weight \[6, 8, 3, 3\]"),
        (lambda g, x, w: (g, x, w[:, :7]), r"a 3x3 convolution of x \[2, 8, 4, 5\] with weight \[6, 7, 3, 3\]"),
        (lambda g, x, w: (g, x, w[..., :1]), r"a 3x3 convolution of x \[2, 8, 4, 5\] with weight \[6, 8, 3, 1\]"),
        (lambda g, x, w: (g[:1], x, w), r"a 3x3 convolution .* does not give \[1, 6, 4, 5\]"),
    ],
)
def test_argument_errors(args, text):
    with pytest.raises(RuntimeError, match=f"{NAME}: {text}"):
        ours(*args(*drawn((2, 8, 4, 5), 6)))


def test_reasons_of_the_backend():
    grad, x, weight = drawn((2, 8, 4, 5), 6)

    def reasons(*args):
        return backends()["cpu"].reasons(NAME, args, {})

    assert reasons(grad, x, weight) == reasons(grad, x, weight.contiguous()) == []
    assert reasons(grad, x.contiguous(), weight) == ["takes channels_last tensors only"]
    assert reasons(grad.double(), x.double(), weight.double()) == ["takes float32, not float64"]
