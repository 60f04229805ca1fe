"""Results leave functions and modules in the layout that stock gives them."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.blocks import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, conv_bn_add_relu
from resnet_fused.blocks.runtime import fused_programs
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.plan import choose
from resnet_fused.steps.layout import suggests_channels_last

CL = torch.channels_last
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": CL}
BOTH = list(itertools.product(FORMATS.values(), repeat=2))


def in_format(t, form):
    """`t` in exactly that layout, as `.to(memory_format=...)` of a module gives it to a 1x1 weight too."""
    return t.clone(memory_format=form)


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 1, 1), (2, 3, 4, 1), (1, 1, 1, 1), (2, 8, 1, 7), (0, 3, 2, 2)],
)
def test_the_rule_is_pytorchs(shape):
    t = torch.randn(shape)
    views = [t, in_format(t, CL), t.expand(2, *t.shape[1:]) if shape[0] == 1 else t, t[..., ::2], in_format(t, CL)[::2]]
    views += [t.transpose(2, 3), t[:, :1].expand_as(t), in_format(t, CL)[:, :2], t.permute(0, 2, 3, 1)]
    for view in views:
        # an operation whose result has the layout that PyTorch takes its argument for
        want = torch._prims_common.suggest_memory_format(view) == CL
        if view.numel():
            made = torch.nn.functional.adaptive_avg_pool2d(view, view.shape[2:])
            assert suggests_channels_last(made) == want or not view.is_contiguous(memory_format=CL)
        assert suggests_channels_last(view) == (want and view.numel() > 0), (view.shape, view.stride())


@pytest.mark.parametrize(("x_format", "weight_format"), BOTH)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_functions(x_format, weight_format, training, kernel, dtype):
    torch.manual_seed(0)
    x = in_format(torch.randn(2, 4, 6, 6, dtype=dtype), x_format).requires_grad_()
    weight = in_format(torch.randn(5, 4, kernel, kernel, dtype=dtype), weight_format)
    residual = in_format(torch.randn(2, 5, 6, 6, dtype=dtype), CL if x_format is not CL else torch.contiguous_format)
    mean, var = torch.zeros(5), torch.ones(5)
    if dtype is torch.float64:
        mean, var = mean.double(), var.double()
    y = F.batch_norm(torch.conv2d(x, weight, None, 1, kernel // 2), mean, var, training=training)
    for added in (None, residual.contiguous().requires_grad_(), residual):
        out = conv_bn_add_relu(x, weight, mean, var, None, None, added, padding=kernel // 2, training=training)
        expected = torch.relu(y if added is None else y + added)
        assert out.stride() == expected.stride()
        leaves = [x, added] if added is not None and added.requires_grad else [x]
        got, want = (torch.autograd.grad(o.sum(), leaves, retain_graph=True) for o in (out, expected))
        assert [g.stride() for g in got] == [g.stride() for g in want]


@pytest.mark.parametrize(("x_format", "weight_format"), BOTH)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("kinds", [(BasicBlock, FusedBasicBlock), (Bottleneck, FusedBottleneck)])
def test_blocks(kinds, x_format, weight_format, training, graded):
    torch.manual_seed(0)
    planes = 8 // kinds[0].expansion
    for stride in (1, 2):
        shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, stride, bias=False), nn.BatchNorm2d(8)) if stride == 2 else None
        x = in_format(torch.randn(2, 8, 6, 6), x_format)
        outs, grads = [], []
        for kind in kinds:
            block = kind(8, planes, stride, copy.deepcopy(shortcut)).to(memory_format=weight_format).train(training)
            h = x.clone().requires_grad_(graded)
            with torch.set_grad_enabled(graded):
                outs.append(block(h))
            if graded:
                grads.append(torch.autograd.grad(outs[-1].sum(), h)[0].stride())
        assert outs[0].stride() == outs[1].stride()
        assert len(set(grads)) <= 1, grads


@pytest.mark.parametrize("training", [True, False])
def test_a_head_may_view_what_stock_lets_it_view(training):
    layer = FusedConvBNReLU(4, 5).train(training)
    x = torch.randn(2, 4, 6, 6)
    layer(x).view(2, -1).sum().backward()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        layer(in_format(x, CL)).view(2, -1)


def test_only_the_main_branch_counts():
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))
    for kind in (BasicBlock, FusedBasicBlock):
        block = kind(4, 8, 1, copy.deepcopy(shortcut))
        block.downsample[0].to(memory_format=CL)
        assert block(torch.randn(2, 4, 6, 6)).is_contiguous()
        block.conv2.to(memory_format=CL)
        assert block(torch.randn(2, 4, 6, 6)).is_contiguous(memory_format=CL)


class Attention(nn.Module):
    """A chain that ends in few channels, with what follows outside of it."""

    def __init__(self, outputs, kernel, last):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(6, outputs, kernel, bias=False), nn.BatchNorm2d(outputs), last

    def forward(self, x):
        return self.last(self.bn(self.conv(x)))


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Identity(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("shape", [(6, 4, 4, 4), (1, 3, 4, 5)], ids=["one pixel", "one channel"])
@pytest.mark.parametrize(("x_format", "weight_format"), BOTH)
def test_what_is_contiguous_in_both_layouts(last, shape, x_format, weight_format):
    """Its strides decide the layout of all that is made of it."""
    outputs, kernel, *size = shape
    stock = Attention(outputs, kernel, last).double().to(memory_format=weight_format)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=x_format)
    with choose.fusing_all():
        for training, graded in itertools.product((True, False), (True, True, False)):
            fused.train(training), stock.train(training)
            before = fused_programs()
            with torch.set_grad_enabled(graded):
                got, want = fused(x), stock(x)
            assert fused_programs() > before or not graded
            assert got.stride() == want.stride()
            torch.testing.assert_close(F.interpolate(got, scale_factor=2), F.interpolate(want, scale_factor=2))
            assert F.interpolate(got, scale_factor=2).stride() == F.interpolate(want, scale_factor=2).stride()
