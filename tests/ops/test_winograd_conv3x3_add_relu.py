"""The 3x3 convolution by a kept Winograd weight beside ATen's: errors, zeros, NaN and infinity, threads, arguments."""

import pytest
import torch
from torch.nn import functional as F

from resnet_fused.backends import backends
from resnet_fused.library import status
from resnet_fused.ops import OPS
from resnet_fused.ops.contract import channels_last

pytestmark = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")
NAME = "winograd_conv3x3_add_relu"
STRIDED = {"blocks": (2, 64, 29, 31), "sums": (3, 96, 7, 8), "a vector": (2, 16, 12, 13)}
SHAPES = {"blocks": (2, 64, 29, 31), "panels": (3, 96, 7, 7), "rest of a vector": (2, 37, 12, 13)}
#: By outputs of a tile and kind of input, the most of stock's root mean square error, and of its largest.
MOST = {
    2: {"normal": 0.8, "after a relu": 0.95, "far mean": 0.6, "huge and tiny": 1.25, "sparse": 1.75},
    4: {"normal": 2.1, "after a relu": 2.4, "far mean": 0.8, "huge and tiny": 4.2, "sparse": 6.5},
}


def packed(weight, outputs, scale=None, stride=1):
    return torch.ops.resnet_fused.winograd_weight3x3(weight, scale, outputs, stride)


def convolve(x, weight, outputs=2, scale=None, **more):
    transformed = packed(weight, outputs, scale, more.get("stride", 1))
    return torch.ops.resnet_fused.winograd_conv3x3_add_relu(x, weight, transformed, scale, **more)


def drawn(shape, outputs=64, padding=1, stride=1):
    """x, weight, scale, shift and residual."""
    torch.manual_seed(0)
    n, c, h, w = shape
    weight = channels_last(torch.randn(outputs, c, 3, 3) / (9 * c) ** 0.5)
    p, q = ((size + 2 * padding - 3) // stride + 1 for size in (h, w))
    residual = channels_last(torch.randn(n, outputs, p, q))
    return channels_last(torch.randn(shape)), weight, torch.rand(outputs) + 0.5, torch.randn(outputs), residual


def values(kind, t):
    return {
        "normal": lambda: t,
        "after a relu": lambda: t.relu(),
        "far mean": lambda: t + 100,
        "sparse": lambda: torch.where(t > 1.5, t, 0),
        "huge and tiny": lambda: t * 10.0 ** (8 * torch.randn_like(t)).clamp(-12, 12).round(),
    }[kind]()


def stock(x, weight, scale, shift, residual, padding=1, relu=True, stride=1):
    return OPS[NAME].reference(x, weight, None, scale, shift, residual, padding, relu, stride)


def rms(error):
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("outputs", MOST)
@pytest.mark.parametrize("kind", MOST[2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_beside_stocks(shape, kind, outputs):
    x, weight, *_ = drawn(shape)
    x = channels_last(values(kind, x))
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    ours, theirs = (y.double() - exact for y in (convolve(x, weight, outputs), F.conv2d(x, weight, padding=1)))
    assert rms(ours) <= MOST[outputs][kind] * rms(theirs)
    assert ours.abs().max() <= (1.1 if outputs == 2 else 8) * theirs.abs().max()


@pytest.mark.parametrize("outputs", MOST)
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "k"),
    [((2, 3, 5, 7), 40), ((1, 65, 9, 4), 65), ((3, 1, 3, 3), 1), ((1, 1, 1, 1), 3), ((2, 33, 14, 15), 7)],
    ids=str,
)
def test_what_is_behind_the_convolution(shape, k, relu, padding, outputs):
    if min(shape[2:]) + 2 * padding < 3:
        pytest.skip("smaller than the kernel")
    x, weight, *behind = drawn(shape, k, padding)
    got = convolve(
        x, weight, outputs, behind[0], shift=behind[1], residual=behind[2], padding=padding, relu=relu
    ).double()
    exact = stock(x.double(), weight.double(), *(t.double() for t in behind), padding, relu)
    torch.testing.assert_close(got, exact, rtol=0, atol=2e-6 if outputs == 2 else 8e-6)


@pytest.mark.parametrize("outputs", MOST)
def test_an_empty_batch(outputs):
    x, weight, scale, shift, residual = drawn((0, 8, 5, 6), 9)
    assert convolve(x, weight, outputs, scale, shift=shift, residual=residual, relu=True).shape == (0, 9, 5, 6)


def test_patches_of_zeros_give_zeros_beside_values_in_the_same_tile():
    x, weight, *_ = drawn((2, 32, 14, 15), 48)
    x[:, :, 3:10, 2:9] = 0
    zero = F.conv2d(x, weight, padding=1) == 0
    assert zero.any()
    assert torch.equal(convolve(x, weight) == 0, zero)


def kinds(t):
    """Where NaN and the two infinities stand."""
    return [t.isnan(), t == torch.inf, t == -torch.inf]


@pytest.mark.parametrize("outputs", MOST)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("where", ["x", "weight", "scale", "shift", "residual"])
@pytest.mark.parametrize("shape", [(2, 40, 9, 10), (2, 20, 24, 23)], ids=["panels", "blocks"])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock(shape, where, value, outputs):
    tensors = dict(zip(("x", "weight", "scale", "shift", "residual"), drawn(shape, 24), strict=True))
    changed = tensors[where]
    if where in ("scale", "shift"):
        changed[3] = value
    else:
        changed[0, 3, 0, 0] = changed[1, 7, 2, 1] = value
    x, weight, scale, shift, residual = tensors.values()
    got = convolve(x, weight, outputs, scale, shift=shift, residual=residual, relu=True)
    assert all(map(torch.equal, kinds(got), kinds(stock(*tensors.values()))))


@pytest.mark.parametrize("outputs", MOST)
def test_a_transform_that_overflows_where_the_direct_sum_does_not(outputs):
    x = channels_last(torch.full((1, 32, 6, 6), 1e38))
    weight = torch.zeros(32, 32, 3, 3)
    weight[:, :, 1, 1] = 1 / 64
    shift = torch.full((32,), -1e37)
    torch.testing.assert_close(convolve(x, weight, outputs, shift=shift), torch.full_like(x, 4e37))


@pytest.mark.parametrize("outputs", MOST)
@pytest.mark.parametrize(("shape", "k"), [((5, 40, 29, 31), 64), ((2, 64, 7, 7), 160), ((1, 16, 3, 3), 16)], ids=str)
def test_bits_do_not_depend_on_the_thread_count(shape, k, outputs):
    x, weight, scale, shift, residual = drawn(shape, k)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(convolve(x, weight, outputs, scale, shift=shift, residual=residual, relu=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("outputs", MOST)
def test_layout_of_the_weight_changes_no_bit(outputs):
    _, weight, scale, *_ = drawn((1, 40, 3, 3), 33)
    apart = torch.randn(2 * 33, 40, 3, 6)[::2, :, :, ::2].copy_(weight)
    for other in (weight.contiguous(), apart, weight.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(packed(weight, outputs, scale), packed(other, outputs, scale))


def test_bytes_count_what_is_read_and_written_once():
    x, weight, scale, shift, residual = drawn((2, 40, 8, 6), 33)
    transformed = packed(weight, 4, scale)
    assert OPS["winograd_weight3x3"].bytes(weight, scale, 4) == 4 * (33 * 40 * 9 + 64 * 40 * 36)
    counted = OPS[NAME].bytes(x, weight, transformed, scale, shift, residual)
    assert counted == 4 * (x.numel() + 64 * 40 * 36 + 2 * residual.numel())
    assert OPS[NAME].flops(x, weight, transformed) == 2 * 2 * 48 * 33 * 40 * 9


@pytest.mark.parametrize("kind", MOST[2])
@pytest.mark.parametrize("shape", STRIDED.values(), ids=STRIDED)
def test_error_of_a_stride_beside_stocks(shape, kind):
    x, weight, *_ = drawn(shape)
    x = channels_last(values(kind, x))
    exact = F.conv2d(x.double(), weight.double(), padding=1, stride=2)
    made = convolve(x, weight, stride=2), F.conv2d(x, weight, padding=1, stride=2)
    ours, theirs = (y.double() - exact for y in made)
    assert rms(ours) <= 1.75 * rms(theirs)
    assert ours.abs().max() <= 2 * theirs.abs().max()


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "k"),
    [((2, 16, 5, 7), 40), ((1, 48, 9, 4), 65), ((3, 16, 3, 3), 1), ((1, 16, 1, 1), 3), ((2, 32, 15, 14), 7)],
    ids=str,
)
def test_what_is_behind_a_convolution_with_a_stride(shape, k, relu, padding):
    if min(shape[2:]) + 2 * padding < 3:
        pytest.skip("smaller than the kernel")
    x, weight, *behind = drawn(shape, k, padding, stride=2)
    more = {"shift": behind[1], "residual": behind[2], "padding": padding, "relu": relu, "stride": 2}
    got = convolve(x, weight, 2, behind[0], **more).double()
    exact = stock(x.double(), weight.double(), *(t.double() for t in behind), padding, relu, stride=2)
    torch.testing.assert_close(got, exact, rtol=0, atol=4e-6)


def test_patches_of_zeros_give_zeros_with_a_stride():
    x, weight, *_ = drawn((2, 32, 15, 17), 48)
    x[:, :, 3:10, 2:9] = 0
    zero = F.conv2d(x, weight, padding=1, stride=2) == 0
    assert zero.any()
    assert torch.equal(convolve(x, weight, stride=2) == 0, zero)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("where", ["x", "weight", "scale", "shift", "residual"])
@pytest.mark.parametrize("shape", [(2, 48, 9, 10), (2, 16, 24, 23)], ids=["sums", "blocks"])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock_with_a_stride(shape, where, value):
    tensors = dict(zip(("x", "weight", "scale", "shift", "residual"), drawn(shape, 24, stride=2), strict=True))
    changed = tensors[where]
    if where in ("scale", "shift"):
        changed[3] = value
    else:
        changed[0, 3, 0, 0] = changed[1, 7, 2, 1] = value
    x, weight, scale, shift, residual = tensors.values()
    got = convolve(x, weight, 2, scale, shift=shift, residual=residual, relu=True, stride=2)
    assert all(map(torch.equal, kinds(got), kinds(stock(*tensors.values(), stride=2))))


@pytest.mark.parametrize(("shape", "k"), [((5, 48, 29, 31), 64), ((2, 64, 14, 14), 160), ((1, 16, 3, 3), 16)], ids=str)
def test_bits_of_a_stride_do_not_depend_on_the_thread_count(shape, k):
    x, weight, scale, shift, residual = drawn(shape, k, stride=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(convolve(x, weight, 2, scale, shift=shift, residual=residual, relu=True, stride=2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a | {"stride": 3}, "stride is 3; pass 1 or 2"),
        (lambda a: a | {"stride": 2}, "x has 8 channels with a stride of 2; pass a multiple of 16"),
        (lambda a: a | {"x": a["x"].contiguous()}, r"x of shape \[2, 8, 4, 5\] is not channels_last"),
        (lambda a: a | {"x": a["x"].double()}, "got Double x and Float weight; pass Float"),
        (lambda a: a | {"padding": 2}, "padding is 2; pass 0 or 1"),
        (lambda a: a | {"weight": a["weight"][:, :7]}, r"weight has shape \[6, 7, 3, 3\]; pass \[K, 8, 3, 3\]"),
        (lambda a: a | {"packed": a["packed"][:, :9]}, r"packed is Float of shape \[1, 9, 8, 32\]; pass what"),
        (
            lambda a: a | {"scale": torch.ones(5)},
            r"scale is Float of shape \[5\]; pass a contiguous Float \[6\]",
        ),
        (lambda a: a | {"residual": torch.ones(2, 6, 4, 4)}, r"residual has shape \[2, 6, 4, 4\] but the result has"),
        (lambda a: a | {"x": channels_last(a["x"][:, :, :2]), "padding": 0}, "smaller than the kernel"),
        (
            lambda a: a | {"x": a["x"][:, :0], "weight": a["weight"][:, :0], "packed": packed(a["weight"][:, :0], 2)},
            "x has no channels; pass one or more",
        ),
    ],
)
def test_argument_errors(change, text):
    weight = torch.randn(6, 8, 3, 3)
    arguments = {"x": channels_last(torch.randn(2, 8, 4, 5)), "weight": weight, "packed": packed(weight, 2)}
    with pytest.raises(RuntimeError, match=f"{NAME}: .*{text}"):
        torch.ops.resnet_fused.winograd_conv3x3_add_relu(**change(arguments))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((torch.randn(4, 4, 3, 1),), r"weight has shape \[4, 4, 3, 1\]; pass \[K, C, 3, 3\]"),
        ((torch.randn(4, 4, 3, 3), None, 3), "outputs is 3; pass 2 or 4"),
        ((torch.randn(4, 4, 3, 3), None, 2, 3), "stride is 3; pass 1 or 2"),
        ((torch.randn(4, 4, 3, 3), None, 4, 2), "outputs is 4 with a stride of 2; pass 2"),
        ((torch.randn(4, 4, 3, 3).double(),), "got Double weight; pass Float"),
    ],
)
def test_argument_errors_of_the_weight(args, text):
    with pytest.raises(RuntimeError, match=f"winograd_weight3x3: {text}"):
        torch.ops.resnet_fused.winograd_weight3x3(*args)


def test_reasons_of_the_backend():
    cpu, x, weight = backends()["cpu"], channels_last(torch.randn(2, 8, 4, 4)), torch.randn(6, 8, 3, 3)
    transformed = packed(weight, 2)

    def reasons(*args):
        return cpu.reasons(NAME, args, {})

    assert reasons(x, weight, transformed) == []
    assert reasons(x.contiguous(), weight, transformed) == ["takes channels_last tensors only"]
    assert reasons(x, weight, transformed, None, torch.ones(12)[::2]) == [
        "takes a contiguous transformed weight and vectors of the activations' dtype only"
    ]
    assert reasons(x, weight, transformed, None, None, None, 1, False, 2) == [
        "takes a multiple of 16 channels with a stride of 2"
    ]
    assert cpu.reasons("winograd_weight3x3", (weight[..., :1],), {}) == ["takes 3x3 weights, not 3x1"]
