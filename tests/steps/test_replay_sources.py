"""Backwards by stock operations take gradients of the node's own arguments, whatever else these were made into."""

import copy

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.plan import choose


def double(make, *shape):
    torch.manual_seed(0)
    stock = make().double()
    return stock, resnet_fused.fuse(copy.deepcopy(stock)), torch.randn(shape, dtype=torch.float64)


def graph(model, apply, x):
    x = x.clone().requires_grad_()
    wanted = [x, *dict.fromkeys(model.parameters())]
    return torch.autograd.grad(apply(model, x).square().sum(), wanted, create_graph=True)


def batched(model, apply, x):
    x = x.clone().requires_grad_()
    out = apply(model, x)
    grads = torch.stack([out.detach(), 2 * out.detach()])
    return torch.autograd.grad(out, [x, *dict.fromkeys(model.parameters())], grads, is_grads_batched=True)


APPLIED = {
    "twice": lambda m, x: m(m(x)),
    "on what a parameter made": lambda m, x: m(x * m.bn1.weight.mean()),
}


@pytest.mark.parametrize("how", [graph, batched])
@pytest.mark.parametrize("apply", APPLIED.values(), ids=APPLIED)
@pytest.mark.parametrize("make", [lambda: Bottleneck(16, 4), lambda: BasicBlock(8, 8)], ids=["bottleneck", "basic"])
def test_an_input_that_was_made_from_the_same_parameters(make, apply, how):
    stock, fused, x = double(make, 2, 16 if isinstance(make(), Bottleneck) else 8, 6, 6)
    with choose.fusing_all():
        for got, expected in zip(how(fused, apply, x), how(stock, apply, x), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_parameter_of_two_nodes_whose_saved_tensors_are_packed():
    def shared():
        block = BasicBlock(8, 8)
        block.bn2.weight, block.conv2.weight = block.bn1.weight, block.conv1.weight
        return block

    stock, fused, x = double(shared, 2, 8, 6, 6)
    hooks = (lambda t: t.clone()), (lambda t: t.clone())
    with choose.fusing_all(), torch.autograd.graph.saved_tensors_hooks(*hooks):
        got = graph(fused, lambda m, x: m(x), x)
    for one, expected in zip(got, graph(stock, lambda m, x: m(x), x), strict=True):
        torch.testing.assert_close(one, expected)


def test_the_residual_alone_wants_a_gradient():
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    residual = torch.randn(2, 8, 6, 6, requires_grad=True)
    with choose.fusing_all():
        out = resnet_fused.conv_bn_add_relu(x, weight, None, None, residual=residual, padding=1, training=True)
        (grad,) = torch.autograd.grad(out.sum(), residual, create_graph=True)
    assert torch.equal(grad, (out > 0).float())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batched_gradients_of_one_image(layout):
    class Handed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

        def forward(self, x):
            n = self.norm
            return resnet_fused.conv_bn_add_relu(
                x, self.conv.weight, n.running_mean, n.running_var, n.weight, n.bias, x.sin(), padding=1, training=True
            )

    torch.manual_seed(0)
    model, x = Handed().double(), torch.randn(1, 8, 6, 6, dtype=torch.float64).contiguous(memory_format=layout)
    with choose.fusing_all():
        got = batched(model, lambda m, x: m(x), x)
    z = x.clone().requires_grad_()
    out = torch.relu(
        nn.functional.batch_norm(model.conv(z), None, None, model.norm.weight, model.norm.bias, True) + z.sin()
    )
    for scale in (1, 2):
        grads = torch.autograd.grad(out, [z, *model.parameters()], scale * out.detach(), retain_graph=True)
        for one, expected in zip(got, grads, strict=True):
            torch.testing.assert_close(one[scale - 1], expected)
