"""Whole chains through the Triton kernels against stock operations in float64: values and the gradient of every input.

Collected where there is a GPU; test_interpreter.py runs it in a process with TRITON_INTERPRET=1.
"""

import pytest
import torch
from chains import Chain, Step, chain_output, run_chain

from resnet_fused.backends.selfcheck import judge
from resnet_fused.backends.triton import common
from resnet_fused.steps import Conv, Norm, StepTensors, value_join

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "full_float32")
DEVICE = torch.device("cpu" if common.INTERPRETING else "cuda")
#: Beyond twice stock's own error: a few roundings of sums.
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 4e-3}
#: dtype, and whether the gradients of narrow convolutions come from one pass: in 16 bits they may.
WAYS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


def make_step(inputs, outputs, kernel=1, *, batch_stats=True, stride=1, groups=1):
    def leaf(*shape):
        return torch.randn(*shape)

    tensors = StepTensors(
        leaf(outputs, inputs // groups, kernel, kernel) / (inputs * kernel**2 / groups) ** 0.5,
        None,
        1 + leaf(outputs) / 4,
        leaf(outputs) / 4,
        leaf(outputs) / 4,
        torch.rand(outputs) + 0.5,
        torch.tensor(0),
    )
    return Step(
        Conv((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups), Norm(batch_stats=batch_stats)
    ), tensors


def placed(tensors, dtype):
    """Tensors of the steps as leaves: weights in `dtype`, batch norm's in float32 (float64 for float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def place(name, t):
        if t is None or not t.is_floating_point():
            return None if t is None else t.clone().to(DEVICE)
        moved = t.to(DEVICE, dtype if name == "weight" else wide)
        return moved if name.startswith("running") else moved.clone().requires_grad_()

    return [StepTensors(**{name: place(name, t) for name, t in own._asdict().items()}) for own in tensors]


def observe(run, chain, x, tensors, residual, factor, cotangent, dtype):
    """Output and gradients by name, in float64 on the CPU."""
    x, own = x.to(DEVICE, dtype).requires_grad_(), placed(tensors, dtype)
    residual = x if residual is None and chain.identity else residual
    out = run(chain, x, own, residual, factor)
    leaves = {"x": x}
    for i, step in enumerate(own):
        leaves |= {f"{name} {i}": t for name, t in step._asdict().items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out))
    seen = {"out": out} | dict(zip(leaves, grads, strict=True))
    return {name: t.detach().double().cpu() for name, t in seen.items()}


def stock(chain, x, tensors, residual, factor):
    return chain_output(chain, x, residual, factor, tensors)


def assert_equal(chain, x, tensors, dtype, factor=None):
    x = x.to(dtype)
    shape = stock(chain, x.double(), placed(tensors, torch.float64), x.double() if chain.identity else None, None).shape
    cotangent = torch.randn(shape)
    arguments = (chain, x, tensors, None, factor, cotangent)
    exact = observe(stock, *arguments, torch.float64)
    theirs, ours = observe(stock, *arguments, dtype), observe(run_chain, *arguments, dtype)
    for name, expected in exact.items():
        stocks, error = ((seen[name] - expected).norm() / expected.norm() for seen in (theirs, ours))
        assert error <= 2 * stocks + FLOOR[dtype], f"{name}: error {error:.2e}, stock's {stocks:.2e}"


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(value_join, "CORRECTION_PAYS", 0)  # whether it pays or not
    # judged by what these tests compare; the checks before a first use, of every configuration met, take minutes here
    monkeypatch.setattr(judge, "doubt", lambda *call: "")


VARIANTS = [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize(("dtype", "one_pass"), WAYS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("gram", "gram_shortcut"), VARIANTS)
def test_bottleneck_with_projection(dtype, one_pass, stride, gram, gram_shortcut):
    s1, t1 = make_step(24, 16)
    s2, t2 = make_step(16, 16, 3, stride=stride)
    s3, t3 = make_step(16, 40)
    shortcut, t4 = make_step(24, 40, stride=stride)
    variant = {"gram": gram, "gram_shortcut": gram_shortcut, "values": True, "one_pass": one_pass}
    chain = Chain((s1, s2, s3), shortcut, backend="triton", **variant)
    assert_equal(chain, torch.randn(2, 24, 9, 8), [t1, t2, t3, t4], dtype)


@pytest.mark.parametrize(("dtype", "one_pass"), WAYS, ids=str)
@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("gram", [False, True])
def test_bottleneck_with_identity(dtype, one_pass, batch_stats, gram):
    (s1, t1), (s2, t2), (s3, t3) = (
        make_step(35, 16, batch_stats=batch_stats),
        make_step(16, 16, 3, groups=2, batch_stats=batch_stats),
        make_step(16, 35, batch_stats=batch_stats),
    )
    variant = {"gram": gram, "values": True, "keep": True, "one_pass": one_pass}
    chain = Chain((s1, s2, s3), identity=True, backend="triton", **variant)
    assert_equal(chain, torch.randn(3, 35, 5, 7), [t1, t2, t3], dtype)
    if not gram:
        assert_equal(chain, torch.randn(3, 35, 5, 7), [t1, t2, t3], dtype, torch.tensor([0.0, 2.0, 2.0], device=DEVICE))


def test_stride_in_the_first_convolution():
    s1, t1 = make_step(24, 16, stride=2)
    s2, t2 = make_step(16, 40)
    shortcut, t3 = make_step(24, 40, stride=2)
    chain = Chain((s1, s2), shortcut, gram=True, gram_shortcut=True, values=True, backend="triton")
    assert_equal(chain, torch.randn(2, 24, 9, 8), [t1, t2, t3], torch.float32)
