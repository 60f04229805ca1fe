"""Frozen norms within their convolution's launch, as on a GPU, by the reference in float64: gradients against stock."""

import dataclasses

import pytest
import torch
from chains import Chain, assert_equal, make_step
from programs import CASES, F64, factor_of, leaves_of, observe

from resnet_fused.plan import choose, gpu_values
from resnet_fused.plan.lower import steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Call
from resnet_fused.steps.frozen import FrozenJoin
from resnet_fused.steps.program import Normalisation
from resnet_fused.steps.program_node import run_program
from resnet_fused.steps.stock import program_output

VARIANTS = {
    "on tensors": Variant(frozen=True),
    "1x1 on values": Variant(True, frozen=True),
    "in one pass": Variant(True, gram=True, gram_shortcut=True, one_pass=True, frozen=True),
}
NAMES = ["post-activation", "post-activation with projection", "post-activation with projection, sampled"]
NAMES += ["post-activation without ReLU", "strided projection", "biases", "a projection of a norm", "averaged shortcut"]
#: Norms of what an average, a sum or several norms read too, or that an average reads.
NONE_FOLDED = ["two norms of one value", "averaged inside", "transition", "a raw value read twice"]


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Whose kernels the reference stands for."""
    torch.manual_seed(0)
    monkeypatch.setattr(choose, "on_gpu", lambda x: True)
    monkeypatch.setattr(gpu_values, "_serves", lambda call, op: True)


def frozen(program, among=lambda value: True):
    """`program` with its norms frozen, those that make values `among` which it says."""
    nodes = []
    for value, node in program.numbered:
        if isinstance(node, Normalisation) and among(value):
            node = dataclasses.replace(node, norm=dataclasses.replace(node.norm, batch_stats=False))
        nodes.append(node)
    return dataclasses.replace(program, nodes=tuple(nodes), backend="reference")


def assert_same(program, x, tensors, variant, folds=True):
    call, leaves = Call(program, x, tensors, None, factor_of(program, x)), leaves_of(x, tensors)
    lowered = steps_of(call, variant)
    assert not folds or any(isinstance(step, FrozenJoin) for step in lowered.steps)
    got, want = observe(run_program(lowered, call), leaves), observe(program_output(call), leaves)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("trained", [True, False], ids=["parameters trained", "parameters fixed"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*NAMES, *NONE_FOLDED])
def test_values_and_gradients(name, variant, trained):
    program, tensors = CASES[name]()
    for own in tensors:
        for t in (own.gamma, own.beta):
            if t is not None:
                t.requires_grad_(trained)
    x = torch.randn(2, 6, 5, 5, dtype=F64, requires_grad=True)
    assert_same(frozen(program), x, tensors, VARIANTS[variant], folds=name not in NONE_FOLDED)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("name", ["post-activation with projection", "a projection of a norm", "strided projection"])
def test_beside_norms_of_the_batch(name, odd, variant):
    """Every second norm is frozen, and of what is joined all or none are folded."""
    program, tensors = CASES[name]()
    x = torch.randn(2, 6, 5, 5, dtype=F64, requires_grad=True)
    assert_same(frozen(program, lambda value: value // 2 % 2 == odd), x, tensors, VARIANTS[variant], folds=False)


@pytest.mark.parametrize("wants", ["x", "weights", "betas", "last gamma"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_wants_no_gradient_gets_none(wants, variant):
    program, tensors = CASES["post-activation with projection"]()
    for i, own in enumerate(tensors):
        chosen = {"weights": own[:1], "betas": own[3:4], "last gamma": own[2:3] if i == 3 else ()}.get(wants, ())
        for t in own[:4]:
            if t is not None:
                t.requires_grad_(any(t is one for one in chosen))
    x = torch.randn(2, 6, 5, 5, dtype=F64, requires_grad=wants == "x")
    assert_same(frozen(program), x, tensors, VARIANTS[variant])


def basic(projected, trained, **kwargs):
    outputs, stride = (10, 2) if projected else (6, 1)
    kwargs |= {"batch_stats": False}
    pairs = [make_step(6, outputs, 3, stride=stride, **kwargs), make_step(outputs, outputs, 3, **kwargs)]
    pairs += [make_step(6, outputs, stride=stride, **kwargs)] if projected else []
    for _, own in pairs:
        own.gamma.requires_grad_(trained), own.beta.requires_grad_(trained)
    steps = [step for step, _ in pairs]
    chain = Chain(tuple(steps[:2]), steps[2] if projected else None, identity=not projected, backend="reference")
    return dataclasses.replace(chain, frozen=True), [own for _, own in pairs]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(("projected", "options"), [(False, {}), (True, {}), (True, {"bias": True})])
def test_a_basic_block(projected, options, sampled, trained):
    chain, tensors = basic(projected, trained, **options)
    x = torch.randn(3, 6, 5, 4, dtype=F64, requires_grad=True)
    factor = torch.tensor([0.0, 2.0, 2.0], dtype=F64) if sampled else None
    for relu in (True, False):
        assert_equal(dataclasses.replace(chain, relu=relu), x, tensors, None if projected else x, factor)
