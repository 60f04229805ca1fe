"""Lazy chains against stock operations in float64, through the reference backend: every variant, every gradient."""

import itertools

import pytest
import torch
from chains import F64, Chain, assert_equal, chain_output, make_step, run_chain

from resnet_fused.steps import value_join

PASSES = {"two passes": False, "one pass": True}  # over the gradient of a narrow convolution; all here are


class Passes:
    one = False


@pytest.fixture(autouse=True, params=PASSES.values(), ids=PASSES)
def passes(request, monkeypatch):
    """Every test with both, and with the correction of a Gram join in a pass of its own whether that pays or not."""
    monkeypatch.setattr(Passes, "one", request.param)
    monkeypatch.setattr(value_join, "CORRECTION_PAYS", 0)


def lazy_chain(steps, shortcut=None, **variant):
    return Chain(tuple(steps), shortcut, values=True, one_pass=Passes.one, backend="reference", **variant)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(3, 6, 5, 6, dtype=F64, requires_grad=True)


GRAMS = [(False, False), (True, False), (True, True)]  # last convolution, shortcut


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("gram", "gram_shortcut"), GRAMS)
def test_bottleneck_with_projection(x, batch_stats, stride, gram, gram_shortcut):
    kwargs = {"batch_stats": batch_stats}
    s1, t1 = make_step(6, 4, **kwargs)
    s2, t2 = make_step(4, 4, 3, stride=stride, **kwargs)
    s3, t3 = make_step(4, 10, **kwargs)
    shortcut, t4 = make_step(6, 10, stride=stride, **kwargs)
    chain = lazy_chain((s1, s2, s3), shortcut, gram=gram, gram_shortcut=gram_shortcut)
    assert_equal(chain, x, [t1, t2, t3, t4])
    if not gram:
        assert_equal(chain, x, [t1, t2, t3, t4], None, torch.rand(3, dtype=F64))


@pytest.mark.parametrize(("gram", "gram_shortcut"), GRAMS)
def test_stride_in_the_first_convolution(x, gram, gram_shortcut):
    """The first ResNets: the gradients of both paths belong to a quarter of the pixels."""
    s1, t1 = make_step(6, 4, stride=2)
    s2, t2 = make_step(4, 4, 3)
    s3, t3 = make_step(4, 10)
    shortcut, t4 = make_step(6, 10, stride=2)
    assert_equal(lazy_chain((s1, s2, s3), shortcut, gram=gram, gram_shortcut=gram_shortcut), x, [t1, t2, t3, t4])


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("strides", [(2, 1), (1, 2)])
def test_stride_in_a_1x1_convolution_of_a_lazy_value(x, batch_stats, strides):
    s1, t1 = make_step(6, 4, batch_stats=batch_stats)
    s2, t2 = make_step(4, 4, stride=strides[0], batch_stats=batch_stats)
    s3, t3 = make_step(4, 6, stride=strides[1], batch_stats=batch_stats)
    shortcut, t4 = make_step(6, 6, stride=2, batch_stats=batch_stats)
    assert_equal(lazy_chain((s1, s2, s3), shortcut), x, [t1, t2, t3, t4])
    if strides[1] == 1:
        assert_equal(lazy_chain((s1, s2, s3), shortcut, gram=True, gram_shortcut=True), x, [t1, t2, t3, t4])


@pytest.mark.parametrize(("gram", "gram_shortcut"), GRAMS)
def test_what_a_stride_passes_over_may_be_nan(x, gram, gram_shortcut):
    s1, t1 = make_step(6, 4, stride=2)
    s2, t2 = make_step(4, 10)
    shortcut, t3 = make_step(6, 10, stride=2)
    chain = lazy_chain((s1, s2), shortcut, gram=gram, gram_shortcut=gram_shortcut)
    wanted = run_chain(chain, x, [t1, t2, t3])
    with torch.no_grad():
        x[:, :, 1::2] = torch.nan
        x[:, :, :, 1::2] = torch.nan
    out = run_chain(chain, x, [t1, t2, t3])
    (grad_x,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, wanted) and grad_x.isfinite().all()


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
    chain = lazy_chain((s1, s2, s3), gram=gram, relu=relu)
    assert_equal(chain, x, [t1, t2, t3], added)
    if not gram:
        assert_equal(chain, x, [t1, t2, t3], added, torch.rand(3, dtype=F64))


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("residual", ["none", "identity", "projection"])
def test_one_step(x, gram, residual):
    step, tensors = make_step(6, 6)
    shortcut, more = make_step(6, 6)
    if residual == "projection":
        assert_equal(lazy_chain((step,), shortcut, gram=gram, gram_shortcut=gram), x, [tensors, more])
    else:
        assert_equal(lazy_chain((step,), gram=gram), x, [tensors], x if residual == "identity" else None)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("kernels", list(itertools.product((1, 3), repeat=2)))
@pytest.mark.parametrize("projected", [False, True])
def test_1x1_after_anything(x, gram, kernels, projected):
    """What a step reads may be lazy or not, whatever the kernel is; a biased convolution is ATen's."""
    first, second = kernels
    s1, t1 = make_step(6, 4, first)
    s2, t2 = make_step(4, 5, second, bias=True)
    s3, t3 = make_step(5, 6)
    shortcut, t4 = make_step(6, 6)
    if projected:
        chain = lazy_chain((s1, s2, s3), shortcut, gram=gram, gram_shortcut=gram)
        assert_equal(chain, x, [t1, t2, t3, t4])
    else:
        assert_equal(lazy_chain((s1, s2, s3), gram=gram), x, [t1, t2, t3], x)


@pytest.mark.parametrize("gram", [False, True])
def test_only_what_is_asked_for(x, gram):
    """Frozen parameters and an input without gradient: nothing wrong, nothing missing."""
    (s1, t1), (s2, t2), (s3, t3) = make_step(6, 4), make_step(4, 4, 3), make_step(4, 6)
    x = x.detach()
    t1 = t1._replace(weight=t1.weight.detach(), gamma=t1.gamma.detach(), beta=t1.beta.detach())
    added = torch.randn_like(x).requires_grad_()
    chain = lazy_chain((s1, s2, s3), gram=gram)
    t3 = t3._replace(weight=t3.weight.detach())
    assert_equal_without_x(chain, x, [t1, t2, t3], added)


def assert_equal_without_x(chain, x, tensors, residual):

    leaves = [t for own in tensors for t in own if t is not None and t.requires_grad] + [residual]
    out, expected = run_chain(chain, x, tensors, residual), chain_output(chain, x, residual, None, tensors)
    cotangent = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(got, want, strict=True))


def test_double_backward():
    (s1, t1), (s2, t2) = make_step(6, 4), make_step(4, 6)
    x = torch.randn(2, 6, 3, 3, dtype=F64, requires_grad=True)  # each element is moved a little

    def out(x, weight):
        return run_chain(lazy_chain((s1, s2), gram=True), x, [t1._replace(weight=weight), t2], x)

    assert torch.autograd.gradgradcheck(out, (x, t1.weight), nondet_tol=1e-9)
    assert torch.autograd.gradcheck(out, (x, t1.weight))
