"""States that users bring modules and inputs into, where stock does something of its own: as stock, or its error."""

import copy
import gc
import weakref

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


# Odd modules, met cold and after calls that kept what they proved -----------------------------------------------


def _narrow_shortcut(model):
    model.layer1[0].downsample = nn.Sequential(nn.Conv2d(8, 1, 1, bias=False), nn.BatchNorm2d(1))


def _far_shortcut(model):
    model.layer2[0].downsample[0].stride = (6, 6)


def _training_is_a_number(model):
    model.layer1[0].bn1.training = 1


def _no_weight(model):
    model.layer1[0].conv1._parameters["weight"] = None


def _expanded_statistics(model):
    model.layer1[0].bn1.running_var = torch.ones(1).expand(8)


def _sparse_weight(model):
    conv = model.layer1[0].conv1
    conv.weight = nn.Parameter(conv.weight.detach().to_sparse(), requires_grad=False)


class TwoStages(nn.Module):
    def __init__(self):
        super().__init__()
        shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.layer1 = nn.Sequential(BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 8, 2, shortcut))

    def forward(self, x):
        return self.layer2(self.layer1(x))


def _expanded_data(model):
    model.layer1[0].bn1.running_var.data = torch.ones(1).expand(8)


ODD = [
    _expanded_data,
    _narrow_shortcut, _far_shortcut, _training_is_a_number, _no_weight, _expanded_statistics, _sparse_weight,
]  # fmt: skip


@pytest.mark.parametrize("change", ODD)
@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("training", [True, False])
def test_odd_modules_are_as_in_stock(change, calls, training):
    torch.manual_seed(0)
    model = TwoStages().train(training)
    fused, x = resnet_fused.fuse(copy.deepcopy(model)), images(size=12)
    found = []
    for side in (fused, model):
        with torch.set_grad_enabled(training):
            for _ in range(calls):
                side(x)
            torch.manual_seed(1)
            change(side)
            try:
                found.append(side(x))
            except Exception as error:
                found.append(type(error))
    assert type(found[0]) is type(found[1])
    if isinstance(found[1], torch.Tensor):
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    else:
        assert found[0] is found[1]


def test_a_namespace_bound_anew_is_noticed(monkeypatch):
    class Doubles:
        def __getattr__(self, name):
            value = getattr(torch.nn.functional, name)
            return (lambda *args, **kwargs: 2 * value(*args, **kwargs)) if name == "batch_norm" else value

    torch.manual_seed(0)
    model, x = TwoStages().eval(), images(size=12)
    fused = resnet_fused.fuse(copy.deepcopy(model))
    fused(x)
    monkeypatch.setattr(nn.modules.batchnorm, "F", Doubles())
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_replaced_parameters_are_freed():
    model = TwoStages().eval()
    fused, x = resnet_fused.fuse(model), images(size=12)
    with torch.no_grad():
        for _ in range(3):
            fused(x)
    held = [weakref.ref(p) for p in fused.layer1.parameters()]
    fused.to("meta")
    gc.collect()
    assert not any(ref() is not None for ref in held)
