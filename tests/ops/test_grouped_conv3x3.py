"""Grouped 3x3 convolutions and both gradients beside ATen's: errors, zeros, what is not finite, threads, arguments."""

import pytest
import torch
from torch.nn import functional as F

from resnet_fused.backends import backends
from resnet_fused.library import status
from resnet_fused.ops import OPS
from resnet_fused.ops.contract import channels_last

pytestmark = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")
#: channels a group, groups, image
GROUPS = {"8 vectors": (4, 32, (15, 17)), "a vector": (8, 2, (9, 30)), "two a group": (32, 3, (14, 14))}
GROUPS |= {"a vector and a half": (24, 2, (8, 7)), "a single group": (16, 1, (7, 7))}
SHAPES = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
STRIDES = pytest.mark.parametrize("stride", [1, 2])


def drawn(groups, stride, images=2):
    """Input, weight and gradient."""
    torch.manual_seed(0)
    width, count, size = groups
    x = channels_last(torch.randn(images, width * count, *size))
    weight = channels_last(torch.randn(width * count, width, 3, 3) / (9 * width) ** 0.5)
    made = [(length - 1) // stride + 1 for length in size]
    return x, weight, channels_last(torch.randn(images, width * count, *made))


def stock(x, weight, grad, stride):
    """Output, the input's gradient, the weight's."""
    groups = x.shape[1] // weight.shape[1]
    out = F.conv2d(x, weight, None, stride, 1, 1, groups)
    settings = ([stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, [True, True, False])
    return out, *torch.ops.aten.convolution_backward(grad, x, weight, None, *settings)[:2]


def ours(x, weight, grad, stride):
    ops = torch.ops.resnet_fused
    more = [size - (made - 1) * stride - 1 for size, made in zip(x.shape[2:], grad.shape[2:], strict=True)]
    z, mean, m2 = ops.grouped_conv3x3(x, weight, stride, False, True)
    back = ops.grouped_conv3x3(grad, weight, stride, True, False, more)[0]
    return z, back, ops.grouped_conv3x3_wgrad(grad, x, weight, stride), mean, m2


def root_mean_square(error):
    return error.square().mean().sqrt().item()


@STRIDES
@SHAPES
def test_no_less_exact_than_stock(groups, stride):
    """By root mean square, forward and gradient; both sum as many products one by one."""
    x, weight, grad = drawn(groups, stride, images=4)
    exact = stock(x.double(), weight.double(), grad.double(), stride)
    theirs, found = stock(x, weight, grad, stride), ours(x, weight, grad, stride)
    for mine, other, wanted in zip(found[:3], theirs, exact, strict=True):
        assert root_mean_square(mine.double() - wanted) <= 1.3 * root_mean_square(other.double() - wanted)
    mean, m2 = OPS["bn_stats"].reference(found[0].double())[:2]
    torch.testing.assert_close(found[3].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[4].double(), m2, rtol=1e-5, atol=0)


@SHAPES
def test_statistics_far_from_zero(groups):
    """A border is made of fewer inputs: what is far from the mean is no pivot that costs digits."""
    x, weight, _ = drawn(groups, 1)
    z, mean, m2 = torch.ops.resnet_fused.grouped_conv3x3(x + 1000, weight, 1, False, True)
    wanted = OPS["bn_stats"].reference(z.double())[:2]
    torch.testing.assert_close(mean.double(), wanted[0], rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(m2.double(), wanted[1], rtol=2e-5, atol=0)


@STRIDES
@SHAPES
def test_zeros_stay_zeros(groups, stride):
    x, weight, grad = drawn(groups, stride)
    x[:, :, 2:7, 1:6] = 0
    grad[:, :, 1:4, 1:4] = 0
    weight[1] = 0
    x[:, 2] = 0
    for mine, other in zip(ours(x, weight, grad, stride)[:3], stock(x, weight, grad, stride), strict=True):
        assert torch.equal(mine == 0, other == 0) and (other == 0).any()


def kinds(t):
    """Where NaN and the two infinities stand."""
    return [t.isnan(), t == torch.inf, t == -torch.inf]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["activations", "weight"])
@STRIDES
@SHAPES
def test_what_is_not_finite_reaches_what_it_reaches_in_a_direct_sum(groups, stride, where, value):
    """Corners and edges, and taps of a weight that padding hides from some outputs; only one channel of a group."""
    x, weight, grad = drawn(groups, stride)
    if where == "weight":
        weight[1, 2, 0, 0] = weight[5, 3, 2, 2] = weight[9, 0, 1, 2] = value
    else:
        for t in (x, grad):
            t[0, 3, 0, 0] = t[1, 7, -1, -1] = t[1, 9, 2, 3] = value
    found = ours(x, weight, grad, stride)
    for mine, wanted in zip(found[:3], stock(x, weight, grad, stride), strict=True):
        assert all(map(torch.equal, kinds(mine), kinds(wanted)))
    mean, m2 = OPS["bn_stats"].reference(found[0])[:2]
    assert torch.equal(found[3].isfinite(), mean.isfinite()) and torch.equal(found[4].isfinite(), m2.isfinite())


@pytest.mark.parametrize("groups", [(4, 72, (29, 31)), (32, 8, (7, 7)), (8, 1, (3, 3))], ids=str)
@STRIDES
def test_bits_do_not_depend_on_the_thread_count(groups, stride):
    arguments = drawn(groups, stride, images=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(ours(*arguments, stride))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@STRIDES
def test_layout_of_the_weight_changes_no_bit(stride):
    x, weight, grad = drawn(GROUPS["8 vectors"], stride)
    apart = torch.randn(2 * 128, 4, 3, 6)[::2, :, :, ::2].copy_(weight)
    expected = ours(x, weight, grad, stride)
    for other in (weight.contiguous(), apart):
        found = ours(x, other, grad, stride)
        assert all(map(torch.equal, expected, found))
    assert torch.ops.resnet_fused.grouped_conv3x3_wgrad(grad, x, weight.contiguous(), stride).is_contiguous()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (lambda x, w: (x.contiguous(), w), r"x of shape \[2, 8, 4, 5\] is not channels_last"),
        (lambda x, w: (x.double(), w.double()), "got Double x and Double weight; pass Float"),
        (lambda x, w: (x, w.bfloat16()), "got Float x and BFloat16 weight; pass Float"),
        (lambda x, w: (x, w, 3), "stride is 3; pass 1 or 2"),
        (lambda x, w: (x, w[:4]), r"weight has shape \[4, 4, 3, 3\]; pass \[8, width, 3, 3\] of groups of that width"),
        (lambda x, w: (x, w[:, :3]), r"weight has shape \[8, 3, 3, 3\]; pass \[8, width, 3, 3\] of groups of that"),
        (lambda x, w: (x, w[..., :1]), r"weight has shape \[8, 4, 3, 1\]"),
        (lambda x, w: (x, w, 2, False, False, [1, 0]), "output_padding has 1; pass 0"),
        (lambda x, w: (x, w, 2, True, False, [0, 2]), "output_padding has 2; pass 0 or 1"),
        (lambda x, w: (x[:, :, :0], w), r"x of shape \[2, 8, 0, 5\] has no pixels; pass images"),
    ],
)
def test_argument_errors(args, text):
    x = channels_last(torch.randn(2, 8, 4, 5))
    with pytest.raises(RuntimeError, match=f"grouped_conv3x3: {text}"):
        torch.ops.resnet_fused.grouped_conv3x3(*args(x, torch.randn(8, 4, 3, 3)))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (lambda g, x, w: (g, x, w, 2), r"with stride 2 and padding 1 does not give \[2, 8, 4, 5\]; pass the gradient"),
        (lambda g, x, w: (g[:1], x, w), r"does not give \[1, 8, 4, 5\]"),
        (lambda g, x, w: (g.double(), x, w), "got Double grad; pass Float"),
        (lambda g, x, w: (g.contiguous(), x, w), r"grad of shape \[2, 8, 4, 5\] is not channels_last"),
        (lambda g, x, w: (g, x, w[:4]), r"weight has shape \[4, 4, 3, 3\]"),
    ],
)
def test_argument_errors_of_the_weight_gradient(args, text):
    x = channels_last(torch.randn(2, 8, 4, 5))
    with pytest.raises(RuntimeError, match=f"grouped_conv3x3_wgrad: .*{text}"):
        torch.ops.resnet_fused.grouped_conv3x3_wgrad(*args(x.clone(), x, torch.randn(8, 4, 3, 3)))


def test_reasons_of_the_backend():
    cpu, x, weight = backends()["cpu"], channels_last(torch.randn(2, 8, 4, 4)), torch.randn(8, 4, 3, 3)
    for op, before in (("grouped_conv3x3", ()), ("grouped_conv3x3_wgrad", (x,))):

        def reasons(*args, op=op, before=before):
            return cpu.reasons(op, (*before, *args), {})

        assert reasons(x, weight) == reasons(x, weight, 2) == []
        assert reasons(x, weight, 3) == ["takes a stride of 1 or 2, not 3"]
        assert reasons(x, weight[:4]) == ["takes groups of as many outputs as inputs"]
        assert reasons(x, weight[..., :1]) == ["takes 3x3 weights, not 3x1"]
        assert reasons(x, weight.double()) == ["takes a weight of the activations' dtype"]
        assert reasons(x.contiguous(), weight) == ["takes channels_last tensors only"]
