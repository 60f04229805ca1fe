"""Chains of steps with tensors of their own, and their comparison with stock operations in float64."""

import torch

from resnet_fused.blocks import run_chain
from resnet_fused.steps import Conv, Norm, Step, StepTensors
from resnet_fused.steps.stock import chain_output

F64 = torch.float64


def make_step(inputs, outputs, kernel=1, *, batch_stats=True, bias=False, stride=1, groups=1):
    def leaf(*shape):
        return torch.randn(*shape, dtype=F64, requires_grad=True)

    tensors = StepTensors(
        leaf(outputs, inputs // groups, kernel, kernel),
        leaf(outputs) if bias else None,
        leaf(outputs),
        leaf(outputs),
        torch.randn(outputs, dtype=F64),
        torch.rand(outputs, dtype=F64) + 0.5,
        torch.tensor(0),
    )
    conv = Conv((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    return Step(conv, Norm(batch_stats=batch_stats)), tensors


def differences(chain, x, tensors, residual=None, factor=None):
    """Largest difference from stock in the output and in the gradient of every input, by name."""
    leaves = {"x": x}
    if residual is not None and residual is not x:
        leaves["residual"] = residual
    for i, step in enumerate(tensors):
        leaves |= {f"{name}{i}": t for name, t in step._asdict().items() if t is not None and t.requires_grad}
    out, expected = run_chain(chain, x, tensors, residual, factor), chain_output(chain, x, residual, factor, tensors)
    cotangent = torch.randn_like(out)
    got = torch.autograd.grad(out, list(leaves.values()), cotangent)
    want = torch.autograd.grad(expected, list(leaves.values()), cotangent)
    found = {name: (a - b).abs().max().item() for name, a, b in zip(leaves, got, want, strict=True)}
    return found | {"out": (out - expected).abs().max().item()}


def assert_equal(*args):
    wrong = {name: value for name, value in differences(*args).items() if not value < 1e-10}
    assert not wrong
