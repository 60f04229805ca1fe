"""Several forwards before one backward, and writes between the two: what stock does, to rounding, errors included."""

import copy

import pytest
import torch
from chains import Chain, chain_output, make_step, run_chain
from torch import nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused.blocks import FusedBottleneck, FusedConvBNReLU, conv_bn_add_relu
from resnet_fused.models.resnet import BasicBlock, Bottleneck

CL = torch.channels_last


def images(n=3, channels=6, size=6, scale=1.0):
    return (scale * torch.randn(n, channels, size, size, dtype=torch.double)).requires_grad_()


def pair(inplanes=6, planes=3):
    """Stock's block and ours with the same parameters."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(inplanes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes))
    stock = Bottleneck(inplanes, planes, 1, shortcut).double()
    fused = FusedBottleneck(inplanes, planes, 1, copy.deepcopy(shortcut)).double()
    fused.load_state_dict(stock.state_dict())
    return stock, fused


def assert_same_run(run, *models):
    """`run(model, x)` leaves the same gradients and buffers behind in both, or raises the same error."""
    seen = []
    for model in models:
        torch.manual_seed(1)
        x = images()
        try:
            run(model, x)
        except RuntimeError as raised:
            seen.append({"error": str(raised).split(":")[0]})
            continue
        tensors = {"x": x.grad} | dict(model.named_buffers())
        seen.append(tensors | {name: p.grad for name, p in model.named_parameters()})
    assert seen[0].keys() == seen[1].keys(), seen
    for name, want in seen[0].items():
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(seen[1][name], want, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert seen[1][name] == want
    return seen[0]


def two_sizes(model, x):
    (model(x).sum() + model(images(2, size=9, scale=3.0)).square().sum()).backward()


def evaluation_then_training(model, x):
    first = model.eval()(x).square().sum()
    (first + model.train()(2 * x.detach()).sum()).backward()


def training_then_evaluation(model, x):
    first = model(x).square().sum()
    (first + model.eval()(2 * x).sum()).backward()


def frozen_norm_trained_since(model, x):
    model.bn2.eval()
    first = model(x).square().sum()
    model.bn2.train()
    (first + model(images(scale=2.0)).sum()).backward()


def two_losses(model, x):
    out = model(x)
    out.sum().backward(retain_graph=True)
    model(images())
    out.square().sum().backward()


def checkpointed(model, x):
    (checkpoint(model, x, use_reentrant=False).sum() + model(images()).square().sum()).backward()


RUNS = [two_sizes, evaluation_then_training, training_then_evaluation, frozen_norm_trained_since]
RUNS += [two_losses, checkpointed]


@pytest.mark.parametrize("run", RUNS)
def test_several_forwards_one_backward(run):
    assert "error" not in assert_same_run(run, *pair())


def test_unfused_forward_before_a_fused_one():
    stock, fused = pair()

    def run(model, x):
        handle = model.conv2.register_forward_hook(lambda *args: None)
        first = model(x).square().sum()
        handle.remove()
        (first + model(images(2)).sum()).backward()

    assert "error" not in assert_same_run(run, stock, fused)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
@pytest.mark.parametrize("written", ["x", "conv2.weight", "bn2.weight", "downsample.0.weight"])
def test_writes_that_stop_stock_stop_us(written, layout):
    def run(model, x):
        given = (x * 1).contiguous(memory_format=layout)
        loss = model(given).sum()
        with torch.no_grad():
            (given if written == "x" else model.get_parameter(written)).add_(1)
        loss.backward()

    assert "error" in assert_same_run(run, *pair())


def test_writing_running_statistics_stops_evaluation():
    def run(model, x):
        loss = model.eval()(x).sum()
        model.bn2.running_var.add_(1)
        loss.backward()

    assert "error" in assert_same_run(run, *pair())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("written", ["bn1.bias", "bn3.bias", "downsample.1.bias"])
def test_writes_that_do_not_stop_stock_do_not_stop_us(written, training):
    def run(model, x):
        loss = model.train(training)(x).square().sum()
        with torch.no_grad():
            model.get_parameter(written).add_(1)
        loss.backward()

    assert "error" not in assert_same_run(run, *pair())


def test_writing_what_gets_no_gradient_does_not_stop_us():
    """Stock saves neither input nor weight of a convolution behind which nothing before it is trained."""

    def run(model, x):
        model.conv1.requires_grad_(False)
        model.downsample.requires_grad_(False)
        given = x.detach().contiguous(memory_format=CL)
        loss = model(given).square().sum()
        with torch.no_grad():
            given.zero_()
            model.conv1.weight.zero_()
            model.downsample[0].weight.zero_()
        loss.backward()

    stock, fused = pair()
    for model in (stock, fused):
        torch.manual_seed(1)
        run(model, images())
    for name, p in stock.named_parameters():
        got = fused.get_parameter(name).grad
        assert (got is None) == (p.grad is None), name
        if got is not None:
            torch.testing.assert_close(got, p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("variant", [{}, {"gram": True}, {"values": True, "backend": "reference"}])
def test_a_residual_is_not_saved(relu, variant):
    """Nor needed by a backward that is differentiated again: the mask tells what it was."""
    torch.manual_seed(0)
    steps, tensors = zip(make_step(6, 4), make_step(4, 6), strict=True)
    x, residual, chain = images(), images(), Chain(steps, relu=relu, **variant)
    results = []
    for ours in (True, False):
        added = residual * 1
        if ours:
            out = run_chain(chain, x, list(tensors), added)
            added.detach().zero_()
        else:
            out = chain_output(chain, x, added, None, list(tensors))
        first = torch.autograd.grad(out.square().sum(), [x, residual, tensors[0].weight], create_graph=True)
        results.append([*first, *torch.autograd.grad(first[0].square().sum(), [x, tensors[1].gamma])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_bias_written_before_a_differentiable_backward_is_an_error():
    _, fused = pair()
    x = images()
    loss = fused(x).square().sum()
    with torch.no_grad():
        fused.bn1.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"tensor of shape \[3\] .* modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_functions_too():
    torch.manual_seed(0)
    weight, x = torch.randn(4, 6, 1, 1, dtype=torch.double, requires_grad=True), images()
    mean, var = torch.zeros(4, dtype=torch.double), torch.ones(4, dtype=torch.double)
    total = sum(conv_bn_add_relu(h, weight, mean, var, training=True).sum() for h in (x, images(2), images(4)))
    total.backward()
    versions = mean._version, var._version
    layer = FusedConvBNReLU(6, 4).double()
    (layer(x).sum() + layer(images(2)).sum()).backward()
    assert versions == (0, 0) and layer.bn.running_mean._version == 0 and mean.abs().min() > 0


def test_statistics_that_move_where_no_gradient_passes():
    """They still decided what the ReLUs behind let pass in the forward that is differentiated."""
    seen = []
    for model in pair():
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith("downsample"))
        torch.manual_seed(1)
        x = images().detach()
        out = model.eval()(x)
        with torch.no_grad():
            model.train()(3 * x + 1)
        out.square().sum().backward()
        seen.append([p.grad for p in model.parameters() if p.requires_grad])
    for want, got in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_one_parameter_of_two_nodes_has_one_gradient_of_gradients():
    """Autograd adds what a node returns for each of its arguments."""
    torch.manual_seed(0)
    stock = BasicBlock(6, 6).double()
    nn.init.uniform_(stock.bn1.weight, 0.5, 1.5)
    stock.bn2.weight = stock.bn1.weight
    fused, x, found = resnet_fused.fuse(copy.deepcopy(stock)), torch.randn(2, 6, 4, 4, dtype=torch.float64), []
    for block in (stock, fused):
        leaves = list(block.parameters())
        first = torch.autograd.grad(block(x).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        found.append([*first, *second])
    for got, wanted in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
