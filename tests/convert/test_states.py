"""States that users bring modules and inputs into, where stock does something of its own: as stock, or its error."""

import copy

import pytest
import torch
from nets import BasicBlock, block, images
from torch import nn
from torch.nn.utils import parametrizations, parametrize

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


def _no_eps(model, x):
    model.bn2.eps = 0.0
    return model(x)


def _one_running_buffer(model, x):
    model.bn1.running_mean = None
    return model(x)


def _one_running_buffer_in_evaluation(model, x):
    model.eval().bn2.running_var = None
    return model(x)


class Noise(nn.Module):
    """A weight that is another one at every look."""

    def forward(self, weight):
        return weight + 0.1 * torch.randn_like(weight)


def _random_weight(model, x):
    parametrize.register_parametrization(model.conv1, "weight", Noise(), unsafe=True)
    torch.manual_seed(0)
    return model(x), model.eval()(x), torch.get_rng_state()


def _weight_that_counts_its_reads(model, x):
    for conv in (model.conv1, model.conv2):
        torch.manual_seed(0)
        parametrizations.spectral_norm(conv)
    return model(x), model(x), [b.clone() for b in model.buffers()]


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
        _no_eps,
        _one_running_buffer,
        _one_running_buffer_in_evaluation,
        _random_weight,
        _weight_that_counts_its_reads,
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


@pytest.mark.parametrize("change", ["replaced", "set", "hooked", "given a forward"])
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
        elif change == "given a forward":
            model.pool.forward = lambda x: (2 * x, x)
        else:
            model.pool.register_forward_hook(lambda module, args, out: (out, args[0]))
    with choose.fusing_all():
        got, want = fused(images().double()), stock(images().double())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class Quantizable(nn.Module):
    """A block that adds by a module, which is no container and has no length."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.skip_add = nn.ReLU(), nn.quantized.FloatFunctional()

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.skip_add.add(out, x))


@pytest.mark.filterwarnings("ignore:fuse. nothing to fuse")
@pytest.mark.parametrize("training", [True, False])
def test_a_quantizable_block(training):
    torch.manual_seed(0)
    stock = Quantizable().double().train(training)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    str(resnet_fused.report(fused))
    torch.testing.assert_close(fused(images().double()), stock(images().double()), rtol=1e-9, atol=1e-9)
