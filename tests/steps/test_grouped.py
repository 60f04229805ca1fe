"""Grouped 3x3 convolutions by our kernels: where they are taken, and that a block then computes what stock does."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from resnet_fused.ops.contract import channels_last
from resnet_fused.plan.lower import steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Conv, Norm, StepTensors, batch_norm, conv, grouped
from resnet_fused.steps.program import Addition, Call, Convolution, Normalisation, Program
from resnet_fused.steps.program_node import run_program

pytestmark = pytest.mark.skipif(not grouped.IS_BUILT, reason="no compiled library for AVX2 or AVX-512")
BY_8 = Conv(padding=(1, 1), groups=8)
BY_8_HALF = dataclasses.replace(BY_8, stride=(2, 2))


def drawn(*shape, dtype=torch.float32):
    return channels_last(torch.randn(shape, dtype=dtype))


@pytest.fixture
def seen(monkeypatch):
    """Names of the ops that a step runs."""
    names, run = [], grouped.run
    monkeypatch.setattr(grouped, "run", lambda op, *args, **options: names.append(op) or run(op, *args, **options))
    return names


def taken(width, size, stride=1, backend="auto", **change):
    """Whether the convolution, its input's gradient and its weight's are ours."""
    geometry = dataclasses.replace(BY_8, stride=(stride, stride), **change)
    x, weight = torch.empty(1, 8 * width, size, size), torch.empty(8 * width, width, 3, 3)
    x, made = channels_last(x), (size - 1) // stride + 1
    grad = channels_last(torch.empty(1, 8 * width, made, made))
    return (
        grouped.takes(x, weight, geometry, backend),
        grouped.takes(grad, weight, geometry, backend, (size, size)),
        grouped.takes_gradient(grad, x, weight, geometry, backend),
    )


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize(("size", "stride"), [(56, 1), (56, 2), (7, 1), (1, 1)])
def test_narrow_groups_are_always_ours(width, size, stride, backend):
    assert taken(width, size, stride, backend) == (True, True, True)


@pytest.mark.parametrize(
    ("width", "size", "stride", "avx512", "avx2"),
    [
        (16, 28, 1, (True, True, True), (True, True, True)),
        (16, 14, 1, (True, True, False), (True, True, True)),
        (16, 14, 2, (True, True, True), (True, True, True)),
        (32, 14, 1, (True, True, True), (True, True, True)),
        (32, 7, 1, (False, False, False), (True, True, False)),
        (32, 28, 2, (True, True, True), (True, True, True)),
        (32, 14, 2, (False, True, True), (True, True, True)),
        (64, 7, 1, (False, False, True), (False, False, True)),
        (112, 28, 1, (True, True, True), (False, False, True)),
        (128, 16, 1, (False, False, True), (False, False, True)),
        (24, 28, 1, (False, False, False), (True, True, True)),
        (1, 28, 1, (False, False, False), (False, False, False)),
    ],
)
def test_wide_groups_are_ours_where_that_is_faster(monkeypatch, width, size, stride, avx512, avx2):
    for level, expected in ((grouped.AVX512, avx512), (grouped.AVX2, avx2)):
        monkeypatch.setattr(grouped, "_HERE", level)
        assert taken(width, size, stride) == expected


@pytest.mark.parametrize(
    "change",
    [{"padding": (0, 0)}, {"padding": (1, 0)}, {"dilation": (2, 2)}, {"groups": 1}, {"backend": "reference"}],
    ids=str,
)
def test_left_to_aten(change):
    assert taken(8, 28, **change) == (False, False, False)


def test_left_to_aten_for_other_kinds_of_tensors(monkeypatch):
    x, weight = drawn(2, 32, 14, 14), torch.empty(32, 4, 3, 3)
    assert grouped.takes(x, weight, BY_8, "auto")
    assert not grouped.takes(x.double(), weight.double(), BY_8, "auto")
    assert not grouped.takes(x.bfloat16(), weight.bfloat16(), BY_8, "auto")
    assert not grouped.takes(x.to("meta"), weight.to("meta"), BY_8, "auto")
    assert not grouped.takes(x.contiguous(), weight, BY_8, "auto")
    assert not grouped.takes(x, torch.empty(64, 4, 3, 3), BY_8, "auto")  # twice as many outputs
    assert not grouped.takes(x, torch.empty(32, 4, 3, 1), BY_8, "auto")
    assert grouped.takes_gradient(x, x, weight, BY_8, "auto")
    assert not grouped.takes_gradient(x.contiguous(), x, weight, BY_8, "auto")
    monkeypatch.setattr(grouped, "IS_BUILT", False)
    assert not grouped.takes(x, weight, BY_8, "auto")


@pytest.mark.parametrize("geometry", [BY_8, BY_8_HALF], ids=["stride 1", "stride 2"])
@pytest.mark.parametrize("size", [(9, 8), (8, 9)], ids=str)
def test_gradients(seen, geometry, size):
    """Of both at once, and of each; a strided convolution's input has one of two sizes."""
    torch.manual_seed(0)
    x, weight = drawn(2, 32, *size), drawn(32, 4, 3, 3)
    exact_x, exact_w = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.conv2d(exact_x, exact_w, None, *geometry.args)
    grad = drawn(*exact.shape)
    wanted_x, wanted_w = torch.autograd.grad(exact, (exact_x, exact_w), grad.double())
    both_x, both_w = conv.gradients(grad, x, weight, geometry, "auto")
    assert sorted(seen) == ["grouped_conv3x3", "grouped_conv3x3_wgrad"]
    assert torch.equal(conv.gradients(grad, x, weight, geometry, "auto", (False, True))[1], both_w)
    assert torch.equal(conv.gradients(grad, x, weight, geometry, "auto", (True, False))[0], both_x)
    torch.testing.assert_close(both_x.double(), wanted_x, rtol=0, atol=2e-5)
    torch.testing.assert_close(both_w.double(), wanted_w, rtol=0, atol=5e-5)
    into = drawn(*x.shape)
    added = conv.gradients(grad, x, weight, geometry, "auto", (True, False), into.clone())[0]
    assert torch.equal(added, into + both_x)


@pytest.mark.parametrize("statistics", [False, True])
def test_statistics_come_with_the_convolution(seen, statistics):
    torch.manual_seed(0)
    x, weight = drawn(4, 32, 14, 13), torch.randn(32, 4, 3, 3)
    z, moments = conv.conv2d(x, weight, None, BY_8, "auto", statistics)
    assert seen == ["grouped_conv3x3"] and (moments is not None) is statistics
    torch.testing.assert_close(z, F.conv2d(x, weight, None, *BY_8.args), rtol=0, atol=1e-4)
    if statistics:
        mean, m2 = (m.double() for m in moments)
        torch.testing.assert_close(mean, z.double().mean((0, 2, 3)), rtol=0, atol=1e-6)
        torch.testing.assert_close(m2, z.double().var((0, 2, 3), correction=0) * z[:, 0].numel(), rtol=2e-6, atol=0)


def test_a_bias_is_left_to_aten(seen):
    x, weight, bias = drawn(2, 32, 6, 5), torch.randn(32, 4, 3, 3), torch.randn(32)
    z, moments = conv.conv2d(x, weight, bias, BY_8, "auto", True)
    torch.testing.assert_close(z, F.conv2d(x, weight, bias, *BY_8.args))
    assert moments is None and not seen


def block(dtype):
    """A strided and a plain grouped convolution, their norms and the sum of the second with what it read."""
    torch.manual_seed(0)
    nodes = [Convolution(0, BY_8_HALF), Normalisation(1, Norm()), Convolution(2, BY_8), Normalisation(3, Norm(), False)]
    tensors = []
    for _ in range(2):
        gamma, beta, mean, var = torch.rand(32) + 0.5, torch.randn(32), torch.randn(32), torch.rand(32)
        weight = torch.randn(32, 4, 3, 3) / 6
        vectors = (gamma.to(dtype).requires_grad_(), beta.to(dtype).requires_grad_(), mean.to(dtype), var.to(dtype))
        tensors += [StepTensors(weight.to(dtype).requires_grad_()), StepTensors(None, None, *vectors, torch.tensor(0))]
    x = drawn(4, 32, 10, 9).to(dtype).requires_grad_()
    return Program((*nodes, Addition(4, 2, True))), x, [*tensors, StepTensors(None)]


def as_steps(program, x, tensors):
    """Output, gradients of `x` and of all parameters, and running statistics."""
    call = Call(program, x, tensors)
    leaves = [x, *(t for own in tensors for t in (own.weight, own.gamma, own.beta) if t is not None)]
    out = run_program(steps_of(call, Variant()), call)
    drawn_once = torch.Generator().manual_seed(1)
    grads = torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=drawn_once).to(out))
    return out, *grads, *(t for own in tensors for t in (own.running_mean, own.running_var) if t is not None)


def test_a_block_reads_no_convolution_for_its_statistics(seen, monkeypatch):
    """The same as in float64, which our kernels do not have."""
    exact = as_steps(*block(torch.float64))
    assert not seen
    monkeypatch.setattr(batch_norm, "normalise", None)  # what reads a convolution's result for its statistics
    ours = as_steps(*block(torch.float32))
    assert seen.count("grouped_conv3x3") == 4 and seen.count("grouped_conv3x3_wgrad") == 2
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * other.abs().max().item())
