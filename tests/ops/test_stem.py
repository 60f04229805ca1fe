"""The ops of convolutions of few channels beside ATen's: errors, what is not finite, threads, bad arguments."""

import pytest
import torch

from resnet_fused.library import status
from resnet_fused.ops import OPS
from resnet_fused.ops.contract import channels_last

pytestmark = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")

POOL = [3, 3], [2, 2], [1, 1]
#: Shape of x, of the weight, stride, padding.
SHAPES = [
    ((4, 3, 65, 70), (64, 3, 7, 7), (2, 2), (3, 3)),
    ((8, 3, 32, 32), (16, 3, 3, 3), (1, 1), (1, 1)),
    ((2, 1, 40, 41), (33, 1, 5, 5), (2, 1), (2, 0)),
    ((2, 4, 33, 30), (96, 4, 4, 4), (4, 4), (0, 0)),
    ((3, 2, 19, 23), (3, 2, 3, 5), (3, 2), (1, 3)),
]


def drawn(shape, kernel, stride, padding):
    """Input, weight, gradient at the output and how the convolution is called."""
    torch.manual_seed(0)
    x, weight = channels_last(torch.randn(shape)), torch.randn(kernel) / kernel[1:].numel() ** 0.5
    z = torch.conv2d(x, weight, None, stride, padding)
    return x, weight, channels_last(torch.randn_like(z)), (list(stride), list(padding))


def vectors(weight):
    """No bias, and a norm's four vectors and eps."""
    gamma, beta, mean = (torch.randn(len(weight)) for _ in range(3))
    return None, mean, torch.rand(len(weight)) + 0.5, gamma, beta, 1e-5


def pooled(x, weight, norm, where):
    """What stock makes of a stem."""
    _, mean, var, gamma, beta, eps = (t.to(x.dtype) if isinstance(t, torch.Tensor) else t for t in norm)
    y = torch.nn.functional.batch_norm(torch.conv2d(x, weight, None, *where), mean, var, gamma, beta, eps=eps)
    return torch.nn.functional.max_pool2d(y.relu(), *POOL)


def calls(shape):
    """By the op's name: a call of it, and stock's of the same in any dtype."""
    x, weight, grad, where = drawn(*map(torch.Size, shape[:2]), *shape[2:])
    norm = vectors(weight)
    ops = torch.ops.resnet_fused
    return {
        "stem_conv": (lambda x, w, g: ops.stem_conv(x, w, *where)[0], lambda x, w, g: torch.conv2d(x, w, None, *where)),
        "stem_conv_wgrad": (
            lambda x, w, g: ops.stem_conv_wgrad(g, x, w, *where),
            lambda x, w, g: OPS["stem_conv_wgrad"].reference(g, x, w, *where),
        ),
        "conv_norm_relu_pool": (
            lambda x, w, g: ops.conv_norm_relu_pool(x, w, *norm, *where, *POOL),
            lambda x, w, g: pooled(x, w, norm, where),
        ),
    }, (x, weight, grad)


def rms(t):
    return t.square().mean().sqrt()


@pytest.mark.parametrize("offset", [0, 100], ids=["mean 0", "mean 100"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["stem_conv", "stem_conv_wgrad", "conv_norm_relu_pool"])
def test_error_is_at_most_twice_stocks(name, shape, offset):
    found, (x, weight, grad) = calls(shape)
    ours, stock = found[name]
    data = x + offset, weight, grad
    exact = stock(*(t.double() for t in data))
    assert rms(ours(*data) - exact) <= 2 * rms(stock(*data) - exact) + 1e-9 * rms(exact)


@pytest.mark.parametrize("offset", [0, 1000], ids=["mean 0", "mean 1000"])
def test_statistics_are_those_of_what_is_written(offset):
    x, weight, _, where = drawn(*map(torch.Size, SHAPES[0][:2]), *SHAPES[0][2:])
    z, mean, m2 = torch.ops.resnet_fused.stem_conv(x + offset, weight, where[0], [0, 0], True)
    rows = z.double().permute(1, 0, 2, 3).flatten(1)
    exact = rows.mean(1), (rows - rows.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2.double(), exact[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_threads_gives_the_same_bits(shape):
    found, data = calls(shape)
    x, weight, _, where = drawn(*map(torch.Size, shape[:2]), *shape[2:])
    runs = [lambda ours=ours: ours(*data) for ours, _ in found.values()]
    runs += [lambda i=i: torch.ops.resnet_fused.stem_conv(x, weight, *where, True)[i] for i in (1, 2)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([run() for run in runs])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def same_kind(got, expected):
    """Whether NaN, infinities and finite numbers are where they are expected."""
    kinds = [(t.isnan(), t == torch.inf, t == -torch.inf) for t in (got, expected)]
    return all(torch.equal(a, b) for a, b in zip(*kinds, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "a corner of x", "weight", "a corner of the weight", "gradient"])
@pytest.mark.parametrize("name", ["stem_conv", "stem_conv_wgrad", "conv_norm_relu_pool"])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock(name, where, value):
    found, (x, weight, grad) = calls(SHAPES[0])
    if where == "x":
        x[1, 0, 30, 31] = value
    elif where == "a corner of x":
        x[0, :, 0, 0] = x[-1, 2, -1, -1] = value
    elif where == "weight":
        weight[3, 1, 3, 3] = value
    elif where == "a corner of the weight":
        weight[3, 1, 0, 0] = weight[20, 2, -1, -1] = weight[21, 0, 0, -1] = value
    else:
        grad[0, 5, 0, 0] = grad[1, 7, -1, -1] = value
    ours, stock = found[name]
    got, expected = ours(x, weight, grad), stock(x, weight, grad)  # in float64 stock multiplies with zeros of padding
    assert same_kind(got, expected)
    finite = expected.isfinite()
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-4, atol=1e-4)


def test_a_gradient_behind_the_pool_is_that_of_two_steps():
    x, weight, _, where = drawn(*map(torch.Size, SHAPES[0][:2]), *SHAPES[0][2:])
    z = torch.ops.resnet_fused.stem_conv(x, weight, *where)[0]
    scale, shift, a, b, d = (torch.randn(64) for _ in range(5))
    out, index = torch.ops.resnet_fused.norm_relu_pool(z, scale, shift, *POOL)
    for more in ((b, d), (None, None)):
        pooled = torch.randn_like(out), index, z, a, *more, scale, shift
        dz = torch.ops.resnet_fused.norm_relu_pool_apply(*pooled, *POOL)
        apart = torch.ops.resnet_fused.stem_conv_wgrad(dz, x, weight, *where)
        assert torch.equal(torch.ops.resnet_fused.stem_pool_wgrad(*pooled, x, weight, *where, *POOL), apart)


@pytest.mark.parametrize("name", ["stem_conv", "stem_conv_wgrad", "conv_norm_relu_pool", "stem_pool_wgrad"])
def test_opcheck(name):
    x, weight, grad, where = drawn(*map(torch.Size, SHAPES[0][:2]), *SHAPES[0][2:])
    if name == "stem_pool_wgrad":
        out, index = torch.ops.resnet_fused.norm_relu_pool(grad, torch.ones(64), torch.zeros(64), *POOL)
        arguments = (out, index, grad, torch.ones(64), None, None, torch.ones(64), torch.zeros(64), x, weight, *where)
    else:
        arguments = {
            "stem_conv": (x, weight, *where, True),
            "stem_conv_wgrad": (grad, x, weight, *where),
            "conv_norm_relu_pool": (x, weight, *vectors(weight), *where),
        }[name]
    torch.library.opcheck(getattr(torch.ops.resnet_fused, name).default, arguments)


def test_bad_arguments_are_named():
    x, weight, grad, where = drawn(*map(torch.Size, SHAPES[0][:2]), *SHAPES[0][2:])
    ops = torch.ops.resnet_fused
    with pytest.raises(RuntimeError, match=r"stem_conv: weight \[64, 2, 7, 7\] does not fit x"):
        ops.stem_conv(x, weight[:, :2], *where)
    with pytest.raises(RuntimeError, match="stem_conv: got Double x"):
        ops.stem_conv(x.double(), weight, *where)
    with pytest.raises(RuntimeError, match=r"stem_conv: x of shape .* is not channels_last"):
        ops.stem_conv(x.contiguous(), weight, *where)
    with pytest.raises(RuntimeError, match=r"stem_conv_wgrad: a convolution of x .* does not give"):
        ops.stem_conv_wgrad(channels_last(grad[:, :, 1:]), x, weight, *where)
    with pytest.raises(RuntimeError, match="conv_norm_relu_pool: got mean without var"):
        ops.conv_norm_relu_pool(x, weight, None, torch.ones(64), None, None, None, 1e-5, *where)
    with pytest.raises(RuntimeError, match="pad should be at most half of effective kernel size"):
        ops.conv_norm_relu_pool(x, weight, *vectors(weight), *where, [3, 3], [2, 2], [2, 2])
