"""States that users bring modules and inputs into, where stock does something of its own: as stock, or its error."""

import copy

import pytest
import torch
from nets import BasicBlock, block, images
from torch import nn

import resnet_fused
from resnet_fused.plan import choose


def _norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _running_requires_grad(model, x):
    model.bn1.running_mean.requires_grad_()
    return model(x)


def _frozen_running_requires_grad(model, x):
    model.eval().bn2.running_var.requires_grad_()
    return model(x)


def _inference_input(model, x):
    with torch.inference_mode():
        x = x * 1
    return model(x)


def _nested_input(model, x):
    return model(torch.nested.nested_tensor(list(x)))


def _counts_without_statistics(model, x):
    for norm in _norms(model):
        norm.running_mean = norm.running_var = None
    return model(x), model.eval()(x), [norm.num_batches_tracked.clone() for norm in _norms(model)]


def _outcome(run, model):
    try:
        return run(model, images().double())
    except Exception as error:  # stock's, of whatever type
        return type(error)


@pytest.mark.parametrize(
    "run",
    [
        _running_requires_grad,
        _frozen_running_requires_grad,
        _inference_input,
        _nested_input,
        _counts_without_statistics,
    ],
)
def test_as_stock(run):
    stock = block(kind=BasicBlock).double()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    assert resnet_fused.report(fused).fused
    with choose.fusing_all():
        got, want = _outcome(run, fused), _outcome(run, stock)
    if isinstance(want, type):
        assert got is want
    else:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("change", ["replaced", "set", "hooked"])
def test_a_pool_that_returns_two_tensors_by_now(change):
    torch.manual_seed(0)
    stock = Pooled().double()
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    assert resnet_fused.report(fused).fused
    for model in (stock, fused):
        if change == "replaced":
            model.pool = nn.MaxPool2d(2, return_indices=True)
        elif change == "set":
            model.pool.return_indices = True
        else:
            model.pool.register_forward_hook(lambda module, args, out: (out, args[0]))
    with choose.fusing_all():
        got, want = fused(images().double()), stock(images().double())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
