"""Chains against stock operations in float64: every variant, forward and each gradient, and the double backward."""

import itertools

import pytest
import torch
from chains import F64, Chain, assert_equal, call_of, chain_output, make_step, run_chain

from resnet_fused.plan import lower
from resnet_fused.steps import Norm, StepTensors


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(3, 6, 5, 6, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("gram", "gram_shortcut"), list(itertools.product([False, True], repeat=2)))
def test_bottleneck_with_projection(x, batch_stats, bias, stride, gram, gram_shortcut):
    if batch_stats and bias and (gram or gram_shortcut):
        pytest.skip("the plan never takes a Gram join with batch statistics behind a biased convolution")
    kwargs = {"batch_stats": batch_stats, "bias": bias}
    s1, t1 = make_step(6, 4, **kwargs)
    s2, t2 = make_step(4, 4, 3, stride=stride, **kwargs)
    s3, t3 = make_step(4, 10, **kwargs)
    shortcut, t4 = make_step(6, 10, stride=stride, **kwargs)
    chain = Chain((s1, s2, s3), shortcut, gram=gram, gram_shortcut=gram_shortcut)
    assert_equal(chain, x, [t1, t2, t3, t4])
    if not gram:
        assert_equal(chain, x, [t1, t2, t3, t4], None, torch.rand(3, dtype=F64))


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", ["none", "identity", "tensor"])
def test_residuals(x, batch_stats, gram, relu, residual):
    (s1, t1), (s2, t2), (s3, t3) = (
        make_step(6, 4, batch_stats=batch_stats),
        make_step(4, 4, 3, groups=2, batch_stats=batch_stats),
        make_step(4, 6, batch_stats=batch_stats),
    )
    added = {"none": None, "identity": x, "tensor": torch.randn_like(x).requires_grad_()}[residual]
    chain = Chain((s1, s2, s3), gram=gram, relu=relu)
    assert_equal(chain, x, [t1, t2, t3], added)
    if not gram:
        assert_equal(chain, x, [t1, t2, t3], added, torch.rand(3, dtype=F64))


@pytest.mark.parametrize("projected", [False, True])
def test_one_step(x, projected):
    step, tensors = make_step(6, 6, 3)
    shortcut, more = make_step(6, 6)
    if projected:
        assert_equal(Chain((step,), shortcut), x, [tensors, more])
    else:
        assert_equal(Chain((step,)), x, [tensors])
        assert_equal(Chain((step,)), x, [tensors], x)


def test_folded_3x3_with_running_statistics(x):
    (s1, t1), (s2, t2) = make_step(6, 4, 3, batch_stats=False), make_step(4, 6, 3, batch_stats=False)
    assert_equal(Chain((s1, s2), gram=True), x, [t1, t2], x)


def test_gram_join_with_a_mean_far_from_zero():
    """A large mean in the input of the join must not cost the variance its digits, in float32."""
    (s1, t1), (s2, t2) = make_step(8, 8), make_step(8, 16)
    t1 = t1._replace(beta=torch.full((8,), 300.0, dtype=F64), gamma=torch.ones(8, dtype=F64))
    x = torch.randn(4, 8, 9, 9, dtype=F64)
    exact = chain_output(Chain((s1, s2)), x, None, None, [t1, t2])
    single = [
        StepTensors(*(t if t is None or t.dtype == torch.int64 else t.detach().float() for t in own))
        for own in (t1, t2)
    ]
    stock = chain_output(Chain((s1, s2)), x.float(), None, None, single)
    fused = run_chain(Chain((s1, s2), gram=True), x.float(), single)
    assert (fused - exact).norm() <= 2 * (stock - exact).norm()


def test_first_and_second_derivatives():
    (s1, t1), (s2, t2) = make_step(3, 2), make_step(2, 3, 3)
    x = torch.randn(2, 3, 3, 3, dtype=F64, requires_grad=True)

    def run(x, w1, g1, b1, w2, g2, b2):
        tensors = [t1._replace(weight=w1, gamma=g1, beta=b1), t2._replace(weight=w2, gamma=g2, beta=b2)]
        return run_chain(Chain((s1, s2)), x, tensors, x)

    leaves = (x, t1.weight, t1.gamma, t1.beta, t2.weight, t2.gamma, t2.beta)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("frozen", ["x", "weight0", "gamma1", "everything but gamma0"])
def test_gradients_only_where_they_are_wanted(x, frozen):
    (s1, t1), (s2, t2) = make_step(6, 4), make_step(4, 6)
    named = {"x": x, "weight0": t1.weight, "gamma0": t1.gamma, "weight1": t2.weight, "gamma1": t2.gamma}
    named |= {"beta0": t1.beta, "beta1": t2.beta}
    for name, tensor in named.items():
        tensor.requires_grad_(name == "gamma0" if frozen.startswith("everything") else name != frozen)
    for gram in (False, True):
        run_chain(Chain((s1, s2), gram=gram), x, [t1, t2], x).sum().backward()
        for name, tensor in named.items():
            assert (tensor.grad is not None) == tensor.requires_grad, name
            tensor.grad = None


def test_running_statistics_move_as_in_stock(x):
    for momentum in (0.1, 0.3, None):
        (step, own), bn = make_step(6, 4), torch.nn.BatchNorm2d(4, momentum=momentum).double()
        step = step._replace(norm=Norm(bn.eps, momentum))
        own = own._replace(
            running_mean=torch.zeros(4, dtype=F64),
            running_var=torch.ones(4, dtype=F64),
            num_batches_tracked=torch.tensor(0),
        )
        for _ in range(3):
            h = torch.randn(2, 6, 4, 4, dtype=F64)
            run_chain(Chain((step,)), h, [own])
            bn(torch.conv2d(h, own.weight))
        torch.testing.assert_close(own.running_mean, bn.running_mean)
        torch.testing.assert_close(own.running_var, bn.running_var)
        assert own.num_batches_tracked == bn.num_batches_tracked == 3


def test_nothing_moves_when_a_later_step_fails(x):
    (s1, t1), (s2, t2) = make_step(6, 4), make_step(5, 6)  # 4 channels into a convolution that takes 5
    before = t1.running_mean.clone()
    with pytest.raises(RuntimeError):
        run_chain(Chain((s1, s2)), x, [t1, t2])
    assert torch.equal(t1.running_mean, before)
    assert t1.num_batches_tracked == 0


def test_strided_last_convolution_is_never_a_gram_join(x):
    step, own = make_step(6, 24, stride=2)
    variant, _ = lower.decide(call_of(Chain((step,)), x.float(), [own]))
    assert not variant.gram
    assert_equal(Chain((step,)), x, [own])


GRAM = {"gram": True, "gram_shortcut": True}
JOINS = {
    "written": {},
    "Gram": GRAM,
    "projection": {"gram_shortcut": True},
    "values": GRAM | {"values": True, "backend": "reference"},
    "one pass": GRAM | {"values": True, "one_pass": True, "backend": "reference"},
}


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_norms_trained_alone(join, batch_stats):
    """Behind frozen convolutions, of which stock saves neither the weights nor what they read: these may be written."""
    kwargs = {"batch_stats": batch_stats, "bias": not batch_stats and "values" not in join}
    (s1, t1), (s2, t2) = make_step(6, 4, 3, **kwargs), make_step(4, 6, **kwargs)
    shortcut, t3 = make_step(6, 6, **kwargs)
    trained = [t2.gamma, t2.beta, t3.gamma, t3.beta]
    for t in (t for own in (t1, t2, t3) for t in own[:4] if t is not None):
        t.requires_grad_(any(t is one for one in trained))
    x, chain, tensors = torch.randn(3, 6, 5, 6, dtype=F64), Chain((s1, s2), shortcut, **join), [t1, t2, t3]
    outs = run_chain(chain, x, tensors), chain_output(chain, x, None, None, tensors)
    for t in (x, *(t for own in tensors for t in own[:2] if t is not None)):
        t.mul_(2)
    got, want = (torch.autograd.grad(out, trained, torch.cos(out.detach() * 9)) for out in outs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
