"""Programs of nodes against stock operations in float64: values with many readers, and each gradient by name."""

import dataclasses

import pytest
import torch
from programs import CASES, F64, NONE, NORM, P1, factor_of, leaves_of, observe, preact_bottleneck

from resnet_fused.plan import lower
from resnet_fused.plan.lower import obstacle, steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Call, StepTensors
from resnet_fused.steps.program import Addition, Convolution, Normalisation, Program
from resnet_fused.steps.program_node import run_program
from resnet_fused.steps.stock import program_output

PLAIN = Variant()
VALUES = {
    "plain": Variant(True),
    "one pass, kept": Variant(True, keep=True, one_pass=True),
    "Gram": Variant(True, gram=True, gram_shortcut=True, one_pass=True),
    "Gram, two passes": Variant(True, gram=True, gram_shortcut=True),
}


def run(program, x, tensors, factor=None, variant=PLAIN):
    call = Call(program, x, tensors, None, factor)
    return run_program(steps_of(call, variant), call)


def stock(program, x, tensors, factor=None, **how):
    return program_output(Call(program, x, tensors, None, factor), **how)


def assert_same(program, x, tensors, factor=None, variant=PLAIN):
    leaves = leaves_of(x, tensors)
    got = observe(run(program, x, tensors, factor, variant), leaves)
    want = observe(stock(program, x, tensors, factor), leaves)
    for name, value in want.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(
                got[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(3, 6, 5, 6, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(x, name):
    program, tensors = CASES[name]()
    assert not obstacle(program)
    assert_same(program, x, tensors, factor_of(program, x))
    assert_same(
        program,
        x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(),
        tensors,
        factor_of(program, x),
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("variant", VALUES)
def test_convolutions_on_values(x, name, dense, variant, monkeypatch):
    """By the reference, in float64; on GPUs these steps are Triton's. Not `dense`: every second of them on tensors."""
    program, tensors = CASES[name]()
    program = dataclasses.replace(program, backend="reference")
    if not dense:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    if not dense and not any(program.terms(v) for v, node in program.numbered if isinstance(node, Addition)):
        on_value = lower._on_value
        monkeypatch.setattr(lower, "_on_value", lambda call, value: value % 4 < 2 and on_value(call, value))
    assert_same(program, x, tensors, factor_of(program, x), VALUES[variant])


GRAMS = {
    "Gram": Variant(gram=True),
    "Gram shortcut": Variant(gram_shortcut=True),
    "both": Variant(gram=True, gram_shortcut=True),
}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("post", "two norms"))])
@pytest.mark.parametrize("variant", GRAMS)
def test_gram_joins(x, name, variant):
    program, tensors = CASES[name]()
    assert_same(program, x, tensors, factor_of(program, x), GRAMS[variant])


@pytest.mark.parametrize("name", ["identity", "strided projection", "activated shortcut"])
@pytest.mark.parametrize("frozen", ["x", "weights", "norms", "last"])
def test_what_wants_no_gradient_gets_none(x, name, frozen):
    program, tensors = CASES[name]()
    for i, own in enumerate(tensors):
        chosen = {"weights": own[:2], "norms": own[2:4], "last": own[:4] if i >= len(tensors) - 3 else ()}.get(
            frozen, ()
        )
        for t in chosen:
            if t is not None:
                t.requires_grad_(False)
    x = x.detach() if frozen == "x" else x
    assert_same(program, x, tensors)


def test_running_statistics_move_as_in_stock(x):
    program, tensors = CASES["strided projection"]()
    mine = [StepTensors(*(None if t is None else t.detach().clone() for t in own)) for own in tensors]
    run(program, x, mine)
    stock(program, x, tensors, moves=True)
    for own, want in zip(mine, tensors, strict=True):
        for got, expected in zip(own[4:], want[4:], strict=True):
            if expected is not None:
                torch.testing.assert_close(got, expected)


def test_first_and_second_derivatives():
    program, tensors = preact_bottleneck()
    x = torch.randn(2, 6, 3, 3, dtype=F64, requires_grad=True)

    def output(x, gamma, weight):
        first = tensors[0]._replace(gamma=gamma)
        last = tensors[5]._replace(weight=weight)
        return run(program, x, [first, *tensors[1:5], last, NONE])

    leaves = x, tensors[0].gamma, tensors[5].weight
    assert torch.autograd.gradcheck(output, leaves)
    assert torch.autograd.gradgradcheck(output, leaves)


def test_batched_gradients(x):
    program, tensors = preact_bottleneck()
    leaves = [x, tensors[1].weight, tensors[2].beta]
    out, want = run(program, x, tensors), stock(program, x, tensors)
    cotangents = torch.randn(2, *out.shape, dtype=F64)
    got = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True)
    for a, b in zip(got, torch.autograd.grad(want, leaves, cotangents, is_grads_batched=True), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("what", ["input", "weight", "gamma"])
def test_writes_before_backward_raise_as_in_stock(x, what):
    program, tensors = preact_bottleneck()
    h = x * 1
    out = run(program, h, tensors)
    written = {"input": h, "weight": tensors[3].weight, "gamma": tensors[2].gamma}[what]
    with torch.no_grad():
        written.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_bias_may_be_written_to_before_backward_but_not_before_one_that_runs_again(x):
    program, tensors = preact_bottleneck()
    out = run(program, x, tensors)
    with torch.no_grad():
        tensors[2].beta.add_(1)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_the_lent_gradient_is_left_alone(x):
    program, tensors = preact_bottleneck()
    out = run(program, x, tensors)
    cotangent = torch.randn_like(out)
    before = cotangent.clone()
    (grad,) = torch.autograd.grad(out, x, cotangent)
    assert torch.equal(cotangent, before) and grad.data_ptr() != cotangent.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["identity", "strided projection", "post-activation with projection"])
def test_errors_are_at_most_twice_stocks(name, dtype):
    program, tensors = CASES[name]()
    x = torch.randn(4, 6, 9, 9, dtype=F64)
    exact = observe(stock(program, x.requires_grad_(), tensors), leaves_of(x, tensors))

    def single(t):
        return None if t is None else t.detach().to(dtype if t.dim() == 4 else torch.float32).requires_grad_()

    mine = [StepTensors(*map(single, own[:4])) for own in tensors]
    h = x.detach().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = leaves_of(h, mine)
    fused = observe(run(program, h, mine), leaves)
    theirs = observe(stock(program, h, mine), leaves)
    unit = torch.finfo(dtype).eps
    for key, want in exact.items():
        ours, stocks = ((side[key].double() - want).norm() / want.norm() for side in (fused, theirs))
        assert ours <= 2 * stocks + 4 * unit * 0.5, key


WRONG = {
    "node 0 reads a value that nobody made": [Convolution(1, P1)],
    "it does not end in a batch norm, an addition or a pool": [Normalisation(0, NORM), Convolution(1, P1)],
    "an addition of a value to itself": [Convolution(0, P1), Addition(1, 1)],
    "neither a convolution nor a batch norm": [Normalisation(0, NORM), Addition(1, 0)],
    "read elsewhere too": [Convolution(0, P1), Normalisation(1, NORM), Addition(1, 2)],
    "a batch norm without ReLU that something but": [Normalisation(0, NORM, False), Convolution(1, P1), Addition(2, 0)],
    "a shortcut in a batch norm": [Normalisation(0, NORM, False), Convolution(0, P1), Addition(2, 1)],
}


@pytest.mark.parametrize("reason", WRONG)
def test_programs_that_no_steps_run(reason):
    program = Program(tuple(WRONG[reason]))
    assert reason in obstacle(program)
    with pytest.raises(ValueError, match="no steps run this program"):
        steps_of(Call(program, torch.randn(1, 6, 1, 1), [NONE] * len(program.nodes)), PLAIN)
