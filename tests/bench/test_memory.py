"""Saved bytes of nets small enough to count by hand."""

import torch
from torch import nn

from resnet_fused.bench.memory import saved_bytes


def test_each_storage_once_and_no_parameters():
    linear = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)
    # the linear layer saves x; the sine saves its input; the product saves it again, and the sine
    expected = 3 * 4 * 8 * 4

    def forward():
        h = linear(x)
        return (h * h.sin()).sum()

    assert saved_bytes(forward, linear.parameters()) == expected


def test_parameters_count_where_they_are_not_excluded():
    linear = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(lambda: linear(x), linear.parameters()) == 4 * 8 * 4
    assert saved_bytes(lambda: linear(x)) == 4 * 8 * 4 + 8 * 8 * 4


def test_a_view_counts_its_whole_storage():
    base = torch.randn(100, 8)
    weight = torch.ones(8, requires_grad=True)
    assert saved_bytes(lambda: base[:2] * weight, [weight]) == 100 * 8 * 4


class Hides(torch.autograd.Function):
    """Keeps a tensor where saved-tensor hooks do not look."""

    @staticmethod
    def forward(ctx, x):
        ctx.state = {"kept": [torch.zeros(256)]}
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_tensors_on_a_context_cannot_hide():
    x = torch.randn(4, requires_grad=True)
    assert saved_bytes(lambda: Hides.apply(x).sum()) == 256 * 4


def test_convolution_block_by_hand():
    block = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    x = torch.randn(2, 4, 5, 5)
    activations = 2 * 5 * 5 * (4 + 8 + 8) * 4  # the input, the convolution's output, the ReLU's
    vectors = 2 * 8 * 4  # mean and reciprocal deviation of the batch
    buffers = {id(b): b.numel() * b.element_size() for b in block.buffers() if b.is_floating_point()}
    assert saved_bytes(lambda: block(x), block.parameters()) == activations + vectors + sum(buffers.values())
