"""The ops of dense blocks: slices of one buffer, a layer's gradients, threads, what is not finite, bad arguments."""

import pytest
import torch
import torch.nn.functional as F

from resnet_fused.backends import backends, run
from resnet_fused.backends.selfcheck.dense_cases import sizes, sliced
from resnet_fused.library import status
from resnet_fused.ops.contract import channels_last, is_slice

compiled = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")
EPS = 1e-5


class Layer:
    """Values for a dense layer, in a buffer of three channels more."""

    def __init__(self, shape, middle, growth, dtype=torch.float32):
        torch.manual_seed(0)
        n, c, h, w = shape
        self.shape, self.middle, self.growth = shape, middle, growth
        self.buffer = channels_last(torch.randn(n, c + growth + 3, h, w, dtype=dtype))
        self.gathered = channels_last(torch.randn_like(self.buffer))
        self.w1 = torch.randn(middle, c, 1, 1, dtype=dtype) / c**0.5
        self.w2 = torch.randn(growth, middle, 3, 3, dtype=dtype) / (3 * middle**0.5)
        self.gamma1, self.beta1 = torch.rand(c, dtype=dtype) + 0.5, torch.randn(c, dtype=dtype)
        self.gamma2, self.beta2 = torch.rand(middle, dtype=dtype) + 0.5, torch.randn(middle, dtype=dtype)
        self.b, self.d = torch.randn(growth, dtype=dtype), torch.randn(growth, dtype=dtype)

    def prefix(self, t):
        return t[:, : self.shape[1]]

    def slice(self, t):
        return t[:, self.shape[1] : self.shape[1] + self.growth]

    def run(self, backend, x):
        """All results of a layer: forward, and backward of what is gathered."""

        def op(name, *args):
            return run(name, *args, backend=backend)

        buffer, gathered = self.buffer.clone(), self.gathered.clone()
        mean1, m1 = op("dense_enter", x, self.prefix(buffer))
        _, rstd1, scale1, shift1, _ = op("bn_affine", mean1, m1, self.gamma1, self.beta1, x, EPS)
        z, mean2, m2 = op("dense_conv1x1", self.prefix(buffer), self.w1, scale1, shift1)
        _, rstd2, scale2, shift2, _ = op("bn_affine", mean2, m2, self.gamma2, self.beta2, z, EPS)
        mean3, m3 = op("dense_conv3x3", z, self.w2, scale2, shift2, self.slice(buffer))
        results = [buffer, mean1, m1, z, mean2, m2, mean3, m3]
        gradient = (self.slice(gathered), self.slice(buffer), self.b, self.d)
        g, sum_g, sum_gz, grad_w2 = op("dense_conv3x3_backward", *gradient, z, self.w2, scale2, shift2, mean2)
        b, d, _ = op("bn_coefficients", sum_g, sum_gz, mean2, rstd2, scale2, z)
        values = (self.prefix(buffer), self.w1, scale1, shift1, mean1)
        sums = op("dense_conv1x1_backward", self.prefix(gathered), None, g, z, scale2, b, d, *values)
        b, d, _ = op("bn_coefficients", sums[0], sums[1], mean1, rstd1, scale1, x)
        grad_x = op("dense_leave", self.prefix(gathered), self.prefix(buffer), b, d)
        return [*results, g, sum_g, sum_gz, grad_w2, gathered, *sums, grad_x]


def of_stock(layer, x):
    """The buffer and the gradients of the input and both weights, by autograd."""
    x, w1, w2 = (t.clone().requires_grad_() for t in (x, layer.w1, layer.w2))
    z = F.conv2d(F.batch_norm(x, None, None, layer.gamma1, layer.beta1, True, eps=EPS).relu(), w1)
    y = F.conv2d(F.batch_norm(z, None, None, layer.gamma2, layer.beta2, True, eps=EPS).relu(), w2, padding=1)
    dy = layer.slice(layer.gathered) + layer.b.view(1, -1, 1, 1) * y.detach() + layer.d.view(1, -1, 1, 1)
    outputs = torch.cat([x, y], 1)
    grads = torch.autograd.grad(outputs, (x, w1, w2), torch.cat([layer.prefix(layer.gathered), dy], 1))
    return outputs.detach(), *grads


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (1, 3, 1, 1), (3, 8, 2, 5)], ids=str)
def test_the_references_are_a_layer_and_its_gradient(shape):
    layer = Layer(shape, 12, 3, torch.float64)
    x = channels_last(torch.randn(shape, dtype=torch.float64))
    if shape[2:] == (1, 1):
        x = channels_last(x.expand(4, -1, -1, -1).contiguous() + torch.randn(4, 1, 1, 1, dtype=torch.float64))
        layer = Layer(tuple(x.shape), 12, 3, torch.float64)
    results = layer.run("reference", x)
    outputs, grad_x, grad_w1, grad_w2 = of_stock(layer, x)
    for got, expected in zip(
        (results[0][:, : outputs.shape[1]], results[-1], results[-2], results[11]),
        (outputs, grad_x, grad_w1, grad_w2),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    untouched = slice(outputs.shape[1], None)
    assert torch.equal(results[0][:, untouched], layer.buffer[:, untouched])
    assert torch.equal(results[12][:, untouched], layer.gathered[:, untouched])


@compiled
@pytest.mark.parametrize(
    "sizes_of",
    [((2, 64, 56, 56), 128, 32), ((3, 256, 14, 14), 128, 32), ((5, 96, 7, 7), 192, 48), ((2, 24, 16, 16), 48, 12)],
    ids=str,
)
def test_a_layer_is_the_references(sizes_of):
    shape, middle, growth = sizes_of
    layer = Layer(shape, middle, growth)
    x = channels_last(torch.randn(shape))
    for got, expected in zip(layer.run("cpu", x), layer.run("reference", x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


@compiled
def test_every_number_of_threads_gives_the_same_bits():
    before, found = torch.get_num_threads(), []
    layers = [Layer((6, 40, 14, 14), 128, 32), Layer((3, 24, 41, 40), 64, 16), Layer((9, 70, 5, 5), 48, 12)]
    inputs = [channels_last(torch.randn(layer.shape)) for layer in layers]
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append([t for layer, x in zip(layers, inputs, strict=True) for t in layer.run("cpu", x)])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@compiled
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38], ids=str)
@pytest.mark.parametrize("where", ["z", "weight", "grad"])
def test_what_is_not_finite_reaches_what_it_reaches_in_a_direct_sum(where, value):
    torch.manual_seed(0)
    shape, growth = (2, 40, 9, 7), 12
    z, weight = channels_last(torch.randn(shape)), torch.randn(growth, 40, 3, 3) / 16
    grad, y = (sliced(torch.randn(sizes(shape, growth))) for _ in range(2))
    scale, shift, mean = torch.ones(40), torch.zeros(40), torch.zeros(40)
    {"z": z, "weight": weight, "grad": grad}[where][1, 3, 1, 1] = value
    slices = [sliced(torch.zeros(sizes(shape, growth))) for _ in range(2)]
    vectors = torch.randn(2, growth)
    args = (grad, y, vectors[0], vectors[1], z, weight, scale, shift, mean)
    results = []
    for backend, out in zip(("cpu", "reference"), slices, strict=True):
        statistics = run("dense_conv3x3", z, weight, scale, shift, out, backend=backend)
        results.append([out, *statistics, *run("dense_conv3x3_backward", *args, backend=backend)])
    for got, expected in zip(*results, strict=True):
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite)
        if got.dim() == 4:
            assert torch.equal(got.isnan(), expected.isnan())
        torch.testing.assert_close(got[finite], expected[finite], rtol=1e-3, atol=1e-3)


@compiled
def test_gradients_are_added_to_another_tensor_or_to_themselves():
    layer = Layer((2, 24, 5, 6), 48, 12)
    z, g = (channels_last(torch.randn(2, 48, 5, 6)) for _ in range(2))
    vectors = (torch.randn(48), torch.randn(48), torch.randn(48))
    values = (layer.prefix(layer.buffer), layer.w1, torch.randn(24), torch.randn(24), torch.randn(24))
    own, other = layer.gathered.clone(), torch.full_like(layer.gathered, torch.nan)
    sums = run("dense_conv1x1_backward", layer.prefix(own), None, g, z, *vectors, *values, backend="cpu")
    dense = channels_last(layer.prefix(layer.gathered).contiguous())
    again = run("dense_conv1x1_backward", layer.prefix(other), dense, g, z, *vectors, *values, backend="cpu")
    assert all(map(torch.equal, sums, again))
    assert torch.equal(layer.prefix(own), layer.prefix(other))
    assert other[:, 24:].isnan().all()
    assert torch.equal(own[:, 24:], layer.gathered[:, 24:])


def test_what_a_slice_is():
    x = channels_last(torch.randn(2, 8, 3, 5))
    assert is_slice(x) and is_slice(x[:, 2:5]) and is_slice(x[1:]) and is_slice(x[:, :0])
    assert is_slice(torch.randn(2, 1, 1, 1)) and is_slice(x[:, :, 1:2, 1:2])
    assert not is_slice(x.contiguous()) and not is_slice(x[:, ::2])
    assert not is_slice(x[:, :, 1:]) and not is_slice(x[:, :, :, 1:]) and not is_slice(x[:, :, ::2, ::2])
    assert not is_slice(x[:1, :1].expand(2, 8, 3, 5))


def bad(name, **others):
    """The arguments of a call with some of them exchanged, in order."""
    layer = Layer((2, 6, 4, 5), 8, 3)
    x = channels_last(torch.randn(layer.shape))
    z, g = (channels_last(torch.randn(2, 8, 4, 5)) for _ in range(2))
    one, many = (torch.ones(6), torch.ones(6)), (torch.ones(8), torch.ones(8))
    gathered = {"grad": layer.slice(layer.gathered), "y": layer.slice(layer.buffer), "b": layer.b, "d": layer.d}
    lazy = {"g": g, "z": z, "a": torch.ones(8), "b": torch.ones(8), "d": torch.ones(8)}
    first = {"x": layer.prefix(layer.buffer), "weight": layer.w1, "scale": one[0], "shift": one[1]}
    second = {"z": z, "weight": layer.w2, "scale": many[0], "shift": many[1]}
    calls = {
        "dense_enter": {"x": x, "out": layer.prefix(layer.buffer)},
        "dense_conv1x1": first,
        "dense_conv3x3": {**second, "out": layer.slice(layer.buffer)},
        "dense_conv3x3_backward": {**gathered, **second, "mean": torch.ones(8)},
        "dense_conv1x1_backward": {
            "out": layer.prefix(layer.gathered),
            "grad": None,
            **lazy,
            **first,
            "mean": torch.ones(6),
        },
        "dense_leave": {"grad": layer.prefix(layer.gathered), "x": x, "b": torch.ones(6), "d": torch.ones(6)},
    }
    assert set(others) <= set(calls[name])
    return tuple((calls[name] | others).values())


X = torch.randn(2, 6, 4, 5)
SHARED = channels_last(torch.randn(2, 12, 4, 5))
BAD = [
    ("dense_enter", {"x": X}, "x of shape .* does not lie in pixels"),
    ("dense_enter", {"x": SHARED[:, :6]}, "x of shape .* is not channels_last"),
    ("dense_enter", {"out": X}, "out of shape .* does not lie in pixels"),
    ("dense_enter", {"x": channels_last(SHARED[:, :6]), "out": channels_last(X[:, :5])}, "pass 6 channels"),
    ("dense_conv1x1", {"x": X}, "x of shape .* does not lie in pixels"),
    ("dense_conv1x1", {"x": channels_last(X).double()}, "x is Double; pass Float"),
    ("dense_conv1x1", {"weight": torch.ones(8, 5, 1, 1)}, r"pass \[K, 6, 1, 1\]"),
    ("dense_conv1x1", {"scale": torch.ones(5)}, r"scale is Float of shape \[5\]; pass a contiguous \[6\] Float"),
    ("dense_conv3x3", {"weight": torch.ones(3, 8, 1, 1)}, r"pass \[3, 8, 3, 3\]"),
    ("dense_conv3x3", {"shift": torch.ones(8).double()}, "shift is Double"),
    ("dense_conv3x3_backward", {"y": channels_last(X)[:, :2]}, "y has shape .* pass 3 channels"),
    ("dense_conv3x3_backward", {"weight": torch.ones(8, 3, 3, 3).transpose(0, 1)}, "weight .* is not dense"),
    ("dense_conv3x3_backward", {"d": torch.ones(8)}, r"d is Float of shape \[8\]"),
    ("dense_conv1x1_backward", {"out": SHARED[:, :6], "grad": SHARED[:, 5:11]}, "grad shares memory with out"),
    ("dense_conv1x1_backward", {"out": SHARED[:, :6], "x": SHARED[:, :6]}, "x shares memory with out"),
    ("dense_conv1x1_backward", {"z": torch.randn(2, 8, 4, 5)}, "z of shape .* does not lie in pixels"),
    ("dense_conv1x1_backward", {"weight": torch.ones(9, 6, 1, 1)}, r"pass \[8, 6, 1, 1\]"),
    ("dense_leave", {"x": channels_last(X)[:, :5]}, "pass 6 channels"),
    ("dense_leave", {"b": torch.ones(12)[::2]}, "pass a contiguous"),
]


@compiled
@pytest.mark.parametrize(("name", "others", "text"), BAD, ids=range(len(BAD)))
def test_bad_arguments_say_what_to_pass(name, others, text):
    with pytest.raises(RuntimeError, match=f"{name}: .*{text}"):
        getattr(torch.ops.resnet_fused, name)(*bad(name, **others))


@compiled
def test_channels_of_one_buffer_share_no_memory():
    buffer = channels_last(torch.randn(2, 13, 4, 5))
    args = bad("dense_conv1x1_backward", out=buffer[:, :6], grad=buffer[:, 6:12])
    torch.ops.resnet_fused.dense_conv1x1_backward(*args)


def test_what_the_kernels_do_not_take_is_declared():
    cpu, layer = backends()["cpu"], Layer((2, 6, 4, 5), 8, 3)
    if status().cpu.loaded:
        assert not cpu.reasons("dense_leave", bad("dense_leave"), {})
    assert cpu.reasons("dense_leave", bad("dense_leave", x=X), {})
    assert cpu.reasons("dense_enter", bad("dense_enter", x=layer.prefix(layer.buffer)), {})
    assert cpu.reasons("dense_conv3x3", bad("dense_conv3x3", shift=torch.ones(8).double()), {})
    assert cpu.reasons("dense_conv1x1", bad("dense_conv1x1", x=channels_last(X).bfloat16()), {})
    weight = torch.ones(8, 3, 3, 3).transpose(0, 1)
    assert cpu.reasons("dense_conv3x3_backward", bad("dense_conv3x3_backward", weight=weight), {})
