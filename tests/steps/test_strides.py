"""Gradients of weights leave with the strides of their weights, whatever the layouts of both."""

import pytest
import torch
from chains import Chain, make_step, run_chain
from torch import nn

import resnet_fused
from resnet_fused.models.resnet import BasicBlock, Bottleneck, ResNet
from resnet_fused.steps.layout import restrided

CL = torch.channels_last


def laid_out(model, layout):
    """`model` with all, none, or every second of its convolution weights in channels_last."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for conv in {"contiguous": [], "channels_last": convolutions, "mixed": convolutions[::2]}[layout]:
        conv.to(memory_format=CL)
    return model


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_models(kind, layout):
    torch.manual_seed(0)
    model = resnet_fused.fuse(laid_out(ResNet(kind, [1, 1, 1, 1], num_classes=3), layout).double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x).sum(), list(parameters.values()))
    for (name, p), grad in zip(parameters.items(), grads, strict=True):
        assert grad.stride() == p.stride(), name
    model(x.contiguous(memory_format=CL)).sum().backward()
    assert all(p.grad.stride() == p.stride() for p in parameters.values())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("variant", [{}, {"gram": True}, {"values": True, "backend": "reference"}])
def test_values_stay(variant, kernel, groups):
    torch.manual_seed(0)
    (s1, t1), (s2, t2) = make_step(6, 4, kernel, groups=groups), make_step(4, 6)
    x, chain = torch.randn(2, 6, 5, 5, dtype=torch.double), Chain((s1, s2), **variant)
    results = []
    for form in (torch.contiguous_format, CL):
        weight = t1.weight.detach().clone(memory_format=form).requires_grad_()
        (grad,) = torch.autograd.grad(run_chain(chain, x, [t1._replace(weight=weight), t2]).square().sum(), weight)
        assert grad.stride() == weight.stride()
        results.append(grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 3])
def test_stock_operations_on_channels_last_values(kernel):
    torch.manual_seed(0)
    (s1, t1), (s2, t2) = make_step(6, 4, kernel), make_step(4, 6)
    x = torch.randn(2, 6, 5, 5, dtype=torch.double).contiguous(memory_format=CL)
    leaves = [t1.weight, t2.weight]
    grads = []
    for stock in (True, False):
        out = run_chain(Chain((s1, s2), stock=stock), x, [t1, t2])
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), t2.weight)
        out = run_chain(Chain((s1, s2), stock=stock), x, [t1, t2])
        batched = torch.autograd.grad(out, leaves, torch.stack([out, 2 * out]).detach(), is_grads_batched=True)
        out = run_chain(Chain((s1, s2), stock=stock), x, [t1, t2])
        plain = torch.autograd.grad(out.square().sum(), leaves)
        assert [g.stride() for g in plain] == [w.stride() for w in leaves]
        grads.append([*first, *second, *batched, *plain])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_nothing_is_copied_where_nothing_moves():
    matrix = torch.randn(6, 4, 1, 1)
    view = restrided(matrix, torch.empty(6, 4, 1, 1).as_strided((6, 4, 1, 1), (4, 1, 4, 4)))
    assert view.data_ptr() == matrix.data_ptr() and view.stride() == (4, 1, 4, 4)
    grad = torch.randn(6, 4, 3, 3).contiguous(memory_format=CL)
    assert restrided(grad, torch.empty_like(grad)) is grad


@pytest.mark.plans_small
@pytest.mark.filterwarnings("error:Grad strides do not match bucket view strides")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
def test_distributed_training_gives_no_warning(tmp_path, layout):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = resnet_fused.fuse(laid_out(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3), layout))
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # in float32: blocks that are small run in stock operations, on channels_last values
            parallel(torch.randn(2, 3, 64, 64)).sum().backward()
        assert all(p.grad.stride() == p.stride() for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
