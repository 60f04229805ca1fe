"""3x3 convolutions by minimal filtering: where they are taken, and that a block then computes what stock does."""

import pytest
import torch

from resnet_fused.ops.contract import channels_last
from resnet_fused.plan.lower import steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Conv, Norm, StepTensors, batch_norm, conv, winograd
from resnet_fused.steps.program import Addition, Call, Convolution, Normalisation, Program
from resnet_fused.steps.program_node import run_program

pytestmark = pytest.mark.skipif(not winograd.IS_BUILT, reason="no compiled library for AVX2 or AVX-512")
SAME = Conv(padding=(1, 1))


def drawn(*shape, dtype=torch.float32):
    return channels_last(torch.randn(shape, dtype=dtype))


@pytest.fixture
def seen(monkeypatch):
    """Names of the ops that a step runs."""
    names, run = [], winograd.run
    monkeypatch.setattr(winograd, "run", lambda op, *args, **options: names.append(op) or run(op, *args, **options))
    return names


@pytest.mark.parametrize("shape", [(8, 24, 28, 28), (1, 64, 7, 7), (1, 512, 7, 7), (8, 64, 56, 56)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_taken_where_it_is_faster(shape, transposed):
    x, weight = torch.empty(shape).contiguous(memory_format=torch.channels_last), torch.empty(shape[1], shape[1], 3, 3)
    for backend in ("auto", "cpu"):
        assert winograd.takes(x, weight, SAME, backend, transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_border_of_tiles_counts(transposed):
    """A gradient without padding is larger than what it is made of; a forward is smaller."""
    weight = torch.empty(64, 64, 3, 3)
    for size, fast in ((7, not transposed), (28, True)):
        x = torch.empty(4, 64, size, size).contiguous(memory_format=torch.channels_last)
        assert winograd.takes(x, weight, Conv(), "auto", transposed) is fast


@pytest.mark.parametrize(
    ("shape", "weight", "geometry"),
    [
        ((8, 16, 28, 28), (16, 16, 3, 3), SAME),  # few channels
        ((8, 3, 28, 28), (64, 3, 3, 3), SAME),
        ((1, 64, 4, 4), (64, 64, 3, 3), SAME),  # few tiles
        ((32, 64, 1, 1), (64, 64, 3, 3), SAME),  # tiles that are padding for the most part
        ((8, 64, 28, 28), (64, 64, 3, 3), Conv((2, 2), (1, 1))),
        ((8, 64, 28, 28), (64, 64, 3, 3), Conv(padding=(2, 2), dilation=(2, 2))),
        ((8, 64, 28, 28), (64, 64, 3, 3), Conv(padding=(2, 2))),
        ((8, 64, 28, 28), (64, 64, 3, 3), Conv(padding=(1, 0))),
        ((8, 64, 28, 28), (64, 32, 3, 3), Conv(padding=(1, 1), groups=2)),
        ((8, 64, 28, 28), (64, 64, 1, 1), Conv()),
        ((8, 64, 28, 28), (64, 64, 1, 3), Conv()),
    ],
)
def test_left_to_aten_where_it_is_not(shape, weight, geometry):
    x = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    assert not winograd.takes(x, torch.empty(weight), geometry, "auto")
    assert not winograd.takes(x, torch.empty(weight), geometry, "auto", transposed=True)


def test_left_to_aten_for_other_kinds_of_tensors_and_backends(monkeypatch):
    x, weight = drawn(8, 64, 14, 14), torch.empty(64, 64, 3, 3)
    assert winograd.takes(x, weight, SAME, "auto")
    assert not winograd.takes(x, weight, SAME, "reference")
    assert not winograd.takes(x, weight, SAME, "triton")
    assert not winograd.takes(x.double(), weight.double(), SAME, "auto")
    assert not winograd.takes(x.bfloat16(), weight.bfloat16(), SAME, "auto")
    assert not winograd.takes(x.to("meta"), weight.to("meta"), SAME, "auto")
    assert not winograd.takes(x.contiguous(), weight, SAME, "auto")
    assert not winograd.takes(drawn(8, 14, 14, 64).permute(0, 3, 1, 2), weight, SAME, "auto")
    monkeypatch.setattr(winograd, "IS_BUILT", False)
    assert not winograd.takes(x, weight, SAME, "auto")


def folded(batch, channels, size, precision="default", threads=1, conv=SAME, outputs=None):
    weight = torch.empty(outputs or channels, channels, 3, 3)
    return winograd.folded(torch.Size((batch, channels, size, size)), weight, conv, precision, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_tiles_in_evaluation_by_precision(channels, size, threads):
    for batch in (8, 32):
        for precision, outputs in (("default", 2), ("fast", 4)):
            tile, saved = folded(batch, channels, size, precision, threads)
            assert tile == outputs and saved > 0


def test_large_weights_meet_too_few_tiles_in_evaluation():
    """A direct sum reads 9 numbers from memory where tiles of 4x4 outputs read 36."""
    assert folded(1, 512, 7, "fast")[0] != 4
    assert folded(1, 512, 7, threads=8) == (0, 0.0)


@pytest.mark.parametrize(
    "more",
    [
        {"conv": Conv((2, 2), (1, 1))},
        {"conv": Conv(padding=(2, 2))},
        {"channels": 3, "outputs": 64},
        {"channels": 8},
        {"batch": 1, "size": 4},
        {"size": 1},
    ],
    ids=str,
)
def test_left_to_onednn_in_evaluation(more):
    case = {"batch": 8, "channels": 64, "size": 28} | more
    assert folded(**case) == folded(**case, precision="fast") == (0, 0.0)


@pytest.mark.parametrize("statistics", [False, True])
def test_statistics_come_with_the_convolution(seen, statistics):
    torch.manual_seed(0)
    x, weight = drawn(4, 32, 14, 13), torch.randn(32, 32, 3, 3) / 17
    z, moments = conv.conv2d(x, weight, None, SAME, "auto", statistics)
    assert seen == ["winograd_conv3x3"] and (moments is not None) is statistics
    if statistics:
        exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
        mean, m2 = (m.double() for m in moments)
        torch.testing.assert_close(mean, exact.mean((0, 2, 3)), rtol=0, atol=1e-6)
        torch.testing.assert_close(m2, exact.var((0, 2, 3), correction=0) * z[:, 0].numel(), rtol=2e-6, atol=0)


def test_a_bias_is_left_to_aten(seen):
    x, weight, bias = drawn(4, 32, 14, 13), torch.randn(32, 32, 3, 3), torch.randn(32)
    z, moments = conv.conv2d(x, weight, bias, SAME, "auto", True)
    torch.testing.assert_close(z, torch.nn.functional.conv2d(x, weight, bias, padding=1))
    assert moments is None and not seen


def test_gradients_of_input_and_weight_are_taken_apart(seen):
    """Added to what is there already, and beside the weight's."""
    torch.manual_seed(0)
    x, weight, grad, into = drawn(2, 32, 9, 8), torch.randn(40, 32, 3, 3) / 17, drawn(2, 40, 9, 8), drawn(2, 32, 9, 8)
    exact = torch.nn.functional.conv_transpose2d(grad.double(), weight.double(), padding=1) + into.double()
    grad_x, grad_weight = conv.gradients(grad, x, weight, SAME, "auto", add_to=into)
    assert grad_x is into and seen == ["winograd_conv3x3"]
    torch.testing.assert_close(grad_x.double(), exact, rtol=0, atol=1e-5)
    wanted = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    torch.testing.assert_close(grad_weight.double(), wanted, rtol=0, atol=1e-4)


def as_steps(program, x, tensors):
    """Output, gradients of `x` and of all parameters, and running statistics."""
    call = Call(program, x, tensors)
    leaves = [x, *(t for own in tensors for t in (own.weight, own.gamma, own.beta) if t is not None)]
    out = run_program(steps_of(call, Variant()), call)
    drawn_once = torch.Generator().manual_seed(1)
    grads = torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=drawn_once).to(out))
    return out, *grads, *(t for own in tensors for t in (own.running_mean, own.running_var) if t is not None)


def basic_block(dtype, precision="default"):
    """Two 3x3 convolutions of 32 channels, their norms and the sum with what came in: values 1 to 5."""
    torch.manual_seed(0)
    nodes = [Convolution(0, SAME), Normalisation(1, Norm()), Convolution(2, SAME), Normalisation(3, Norm(), False)]
    tensors = []
    for _ in range(2):
        gamma, beta, mean, var = torch.rand(32) + 0.5, torch.randn(32), torch.randn(32), torch.rand(32)
        weight = torch.randn(32, 32, 3, 3) / 17
        vectors = (gamma.to(dtype).requires_grad_(), beta.to(dtype).requires_grad_(), mean.to(dtype), var.to(dtype))
        tensors += [StepTensors(weight.to(dtype).requires_grad_()), StepTensors(None, None, *vectors, torch.tensor(0))]
    x = drawn(4, 32, 10, 9).to(dtype).requires_grad_()
    return Program((*nodes, Addition(4, 0, True)), precision=precision), x, [*tensors, StepTensors(None)]


def test_a_block_reads_no_convolution_for_its_statistics(seen, monkeypatch):
    """The same as in float64, which minimal filtering does not have."""
    exact = as_steps(*basic_block(torch.float64))
    assert not seen
    monkeypatch.setattr(batch_norm, "normalise", None)  # what reads a convolution's result for its statistics
    ours = as_steps(*basic_block(torch.float32))
    assert seen == ["winograd_conv3x3"] * 4
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_precision_in_training(seen, monkeypatch):
    """Larger tiles forward and backward, where a program asks for them; within their error."""
    tiles, run = [], winograd.run
    monkeypatch.setattr(winograd, "run", lambda op, *args, **more: tiles.append(args[-1]) or run(op, *args, **more))
    monkeypatch.setattr(winograd, "_IN_DOUBLE", 0)  # so small images are taken
    monkeypatch.setitem(winograd._TRANSFORM, 4, 0)
    exact = as_steps(*basic_block(torch.float64))
    for precision, outputs in (("default", 2), ("fast", 4)):
        ours = as_steps(*basic_block(torch.float32, precision))
        assert tiles == [outputs] * 4
        tiles.clear()
        for one, other in zip(ours, exact, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=4e-5 * other.abs().max().item())


def test_tiles_in_training():
    weight, small = torch.empty(64, 64, 3, 3), torch.empty(512, 512, 3, 3)
    for transposed in (False, True):
        where = SAME, transposed
        assert winograd.tiles_of(torch.Size((8, 64, 56, 56)), weight, *where)[0] == 2
        assert winograd.tiles_of(torch.Size((8, 64, 56, 56)), weight, *where, "fast")[0] == 4
        assert winograd.tiles_of(torch.Size((1, 512, 7, 7)), small, *where, "fast")[0] == 2
        assert winograd.tiles_of(torch.Size((1, 64, 2, 2)), weight, *where, "fast") == (0, 0)


@pytest.mark.skipif(not winograd.IS_BUILT, reason="no library with vectors")
def test_a_stride_of_two_is_filtered_where_products_are_what_takes_time():
    strided = Conv(stride=(2, 2), padding=(1, 1))

    def taken(shape, outputs, conv=strided, precision="default"):
        return winograd.folded(torch.Size(shape), torch.empty(outputs, shape[1], 3, 3), conv, precision, 2)[0]

    assert [taken((8, c, size, size), 2 * c) for c, size in ((64, 56), (128, 28), (256, 14))] == [2, 2, 2]
    assert taken((8, 64, 56, 56), 128, precision="fast") == 2
    assert taken((1, 256, 14, 14), 512) == 0  # whose weight takes longer to read
    assert taken((8, 72, 56, 56), 128) == 0  # channels beyond whole vectors
    assert taken((8, 64, 56, 56), 128, Conv(stride=(2, 1), padding=(1, 1))) == 0
    assert not winograd.takes(
        torch.empty(8, 64, 56, 56).to(memory_format=torch.channels_last), torch.empty(128, 64, 3, 3), strided, "auto"
    )
