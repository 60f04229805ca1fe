"""Gradients in float32 where convolutions' outputs have means far from zero, beside their deviation.

The yardstick is the more exact of stock's layouts: in contiguous tensors its batch norm sums in float64. That says
something about batch norm where convolutions round alike in both, as 1x1 convolutions do.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from chains import Chain, Step, chain_output, run_chain

from resnet_fused.steps import Conv, Norm, Pool, StepTensors

SEEDS = 5  # the median of so many draws: a sign that turns by rounding is an error of another kind
ROUNDING = torch.finfo(torch.float32).eps  # of the result itself


def far_step(x, outputs, batch_stats):
    """A 1x1 step whose outputs have means of both signs, five to fifteen times their deviation, and its output."""
    signs = 1 - 2 * (torch.arange(outputs) % 2).view(-1, 1, 1, 1)
    weight = (torch.randn(outputs, x.shape[1], 1, 1) + signs) / x.shape[1] ** 0.5
    z = F.conv2d(x, weight.double())
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    assert 5 < (mean.abs() / std).median() < 15
    gamma, beta = 1 + torch.randn(outputs) / 4, 1 + torch.randn(outputs) / 4
    running = (mean * (1 + torch.randn(outputs) / 50)).float(), std.square().float()
    own = StepTensors(weight, None, gamma, beta, *running, torch.tensor(0))
    out = F.batch_norm(z, None, None, gamma.double(), beta.double(), True)
    return Step(Conv(), Norm(batch_stats=batch_stats)), own, F.relu(out)


def observe(run, chain, x, tensors, dtype, layout):
    """Output and gradients by name, in float64; the gradient behind the chain has a mean too."""
    x = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
    own, leaves = [], {"x": x}
    for i, step in enumerate(tensors):
        floating = {k: t.to(dtype, copy=True) for k, t in step._asdict().items() if t is not None and t.dim()}
        own.append(step._replace(**floating))
        leaves |= {f"{name}{i}": floating[name].requires_grad_() for name in ("weight", "gamma", "beta")}
    out = run(chain, x, own)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) + 1
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent.to(dtype))
    return {"out": out.detach().double()} | {k: g.double() for k, g in zip(leaves, grads, strict=True)}


def stock(chain, x, tensors):
    return chain_output(chain, x, x if chain.identity else None, None, tensors)


def errors(make, seed):
    """For each result, by name: its relative error, and that of stock in either layout."""
    torch.manual_seed(seed)
    chain, x, tensors = make()
    exact = observe(stock, chain, x, tensors, torch.float64, torch.channels_last)
    runs = itertools.product((run_chain, stock), (torch.channels_last, torch.contiguous_format))
    found = [observe(run, chain, x, tensors, torch.float32, layout) for run, layout in runs]
    return {k: [((f[k] - e).norm() / e.norm()).item() for f in found[1:]] for k, e in exact.items()}


def assert_exact(make):
    seen = [errors(make, seed) for seed in range(SEEDS)]
    for name in seen[0]:
        own, *stocks = torch.tensor([e[name] for e in seen]).median(0).values.tolist()
        assert own <= 2 * min(stocks) + ROUNDING, f"{name}: error {own:.2e}, stock's {min(stocks):.2e}"


def far_input(channels=64):
    return (torch.randn(4, channels, 16, 16).relu() + 0.5).double()


CHAINS = {"CPU": {}, "lazy": {"values": True, "backend": "reference"}}


@pytest.mark.parametrize("variant", CHAINS)
@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("residual", ["none", "identity", "projection"])
def test_every_gradient(residual, batch_stats, variant):
    def make():
        x = far_input()
        h, steps, tensors = x, [], []
        for outputs in (48, 48, 64):
            step, own, h = far_step(h, outputs, batch_stats)
            steps.append(step)
            tensors.append(own)
        shortcut = None
        if residual == "projection":
            shortcut, own, _ = far_step(x, 64, batch_stats)
            tensors.append(own)
        return Chain(tuple(steps), shortcut, identity=residual == "identity", **CHAINS[variant]), x, tensors

    assert_exact(make)


@pytest.mark.parametrize("pool", [None, Pool()])
def test_one_step(pool):
    def make():
        x = far_input()
        step, own, _ = far_step(x, 64, True)
        return Chain((step,), pool=pool), x, [own]

    assert_exact(make)
