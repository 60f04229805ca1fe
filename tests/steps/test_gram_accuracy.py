"""Gradients in float32 through Gram joins, beside those of stock in the same layout: at most twice the error.

A Gram join's output is channels_last, whatever came in; stock's batch norm sums in float64 in contiguous tensors, so
that those are the harder yardstick. Without AVX-512 stock's gradient of 256 contiguous channels is three times as exact
as of the same in channels_last, in which a Gram join computes, and that counts too. Errors are of
float64's results, relative to them; the median of a few draws, since single ones are luck on either side. Cotangents
are 0 where an output is about to change its sign by rounding: an error of another kind. Statistics have the deviation
as their scale: a mean may be 0.
"""

import dataclasses

import pytest
import torch
from chains import Chain, Step, chain_output, make_step, run_chain

from resnet_fused.steps import Conv
from resnet_fused.steps.conv import HAS_AVX512

SEEDS = 7
FLOOR = 2 * torch.finfo(torch.float32).eps  # of the result's own scale: what rounding each of its inputs does
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def make(channels, images, size, residual, mean=None, stride=1, steps=1, gamma=1.0):
    """A chain with Gram joins into four times the channels, its input (after a ReLU, or with means), its tensors."""
    x = torch.randn(images, channels, size * stride, size * stride)
    signs = 1 - 2 * (torch.arange(channels) % 2).view(1, -1, 1, 1)
    x = x.relu() if mean is None else x + mean * signs
    outputs = [channels] * (steps - 1) + [4 * channels]
    own, tensors = zip(*(make_step(channels, k) for k in outputs), strict=True)
    own, tensors, shortcut = list(own), list(tensors), None
    if stride > 1:
        own[0] = Step(Conv(stride=(stride, stride)), own[0].norm)
    if residual == "projection":
        shortcut, projected = make_step(channels, 4 * channels, stride=stride)
        tensors.append(projected)
    tensors = [t._replace(weight=t.weight / channels**0.5, gamma=gamma * t.gamma) for t in tensors]
    tensors = [
        t._replace(**{k: v.detach().float() for k, v in t._asdict().items() if v is not None and v.dim()})
        for t in tensors
    ]
    other = torch.randn(images, 4 * channels, size, size).relu() if residual == "tensor" else None
    return Chain(tuple(own), shortcut, gram=True, gram_shortcut=shortcut is not None), x, tensors, other


def observe(run, case, dtype, layout, cotangent):
    chain, x, tensors, residual = case
    own, leaves = [], {}
    for name, value in (("x", x), ("residual", residual)):
        if value is not None:
            leaves[name] = value.to(dtype).contiguous(memory_format=layout).requires_grad_()
    for i, step in enumerate(tensors):
        floating = {k: t.to(dtype, copy=True) for k, t in step._asdict().items() if t is not None and t.dim()}
        own.append(step._replace(**floating, num_batches_tracked=torch.tensor(0)))
        leaves |= {f"{name}{i}": floating[name].requires_grad_() for name in ("weight", "gamma", "beta")}
    out = run(chain, leaves["x"], own, leaves.get("residual"))
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent.to(dtype).contiguous(memory_format=layout))
    found = {"out": out.detach()} | dict(zip(leaves, grads, strict=True))
    for i, step in enumerate(own):
        found |= {f"running_mean{i}": step.running_mean, f"running_var{i}": step.running_var}
    return {k: t.double() for k, t in found.items()}


def stock(chain, x, tensors, residual):
    return chain_output(chain, x, residual, None, tensors, moves=True)


def steady_cotangent(case):
    """Of normal deviates with a mean, 0 where float32 may have the other sign before the ReLU."""
    chain, x, tensors, residual = case
    linear = dataclasses.replace(chain, relu=False)
    double = [t._replace(**{k: v.double() for k, v in t._asdict().items() if v is not None}) for t in tensors]
    y = chain_output(linear, x.double(), None if residual is None else residual.double(), None, double)
    return (torch.randn(y.shape) + 1) * (y.detach().abs() > 1e-5)


def errors(arguments, seed, layout):
    """For each result by name: our relative error, and stock's."""
    torch.manual_seed(seed)
    case = make(**arguments)
    cotangent = steady_cotangent(case)
    exact = observe(stock, case, torch.float64, torch.contiguous_format, cotangent)
    ways = [(run_chain, layout), *((stock, each) for each in {layout, layout if HAS_AVX512 else torch.channels_last})]
    found = [observe(run, case, torch.float32, each, cotangent) for run, each in ways]

    def scale(name, value):
        deviation = exact["running_var" + name.removeprefix("running_mean")].sqrt() if "_mean" in name else value
        return deviation.norm()

    own, *stocks = ({k: ((f[k] - e).norm() / scale(k, e)).item() for k, e in exact.items()} for f in found)
    return {k: [own[k], max(each[k] for each in stocks)] for k in exact}


CASES = {
    "narrow, many pixels": {"channels": 8, "images": 8, "size": 32, "residual": "none"},
    "narrow, no ReLU before": {"channels": 8, "images": 8, "size": 32, "residual": "tensor", "mean": 0.0},
    "16 channels": {"channels": 16, "images": 8, "size": 16, "residual": "none"},
    "64 channels": {"channels": 64, "images": 4, "size": 16, "residual": "tensor"},
    "256 channels": {"channels": 256, "images": 8, "size": 8, "residual": "none"},
    "means, few channels": {"channels": 4, "images": 4, "size": 8, "residual": "none", "mean": 3.0},
    "far means, few channels": {"channels": 4, "images": 4, "size": 8, "residual": "projection", "mean": 10.0},
    "far means, many pixels": {"channels": 8, "images": 8, "size": 32, "residual": "tensor", "mean": 10.0},
    "far means, many channels": {"channels": 128, "images": 2, "size": 8, "residual": "none", "mean": 10.0},
    "one channel": {"channels": 1, "images": 4, "size": 8, "residual": "none", "mean": 10.0},
    "three steps": {"channels": 16, "images": 4, "size": 8, "residual": "projection", "steps": 3},
    "strided projection": {"channels": 16, "images": 4, "size": 8, "residual": "projection", "steps": 3, "stride": 2},
    "gamma near zero": {"channels": 16, "images": 4, "size": 8, "residual": "tensor", "gamma": 1e-3},
    "gamma negative": {"channels": 16, "images": 4, "size": 8, "residual": "tensor", "gamma": -1.0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_at_most_twice_the_error_of_stock(case, layout):
    seen = [errors(CASES[case], seed, LAYOUTS[layout]) for seed in range(SEEDS)]
    for name in seen[0]:
        if CASES[case]["channels"] == 1 and name.startswith("weight"):
            continue  # 0 but for eps: batch norm takes the scale of its input away
        own, stocks = torch.tensor([e[name] for e in seen]).median(0).values.tolist()
        assert own <= 2 * stocks + FLOOR, f"{name}: error {own:.2e}, stock's {stocks:.2e}"
