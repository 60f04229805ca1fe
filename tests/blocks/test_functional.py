"""`conv_bn_add_relu` and the fused modules, as a user calls them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, conv_bn_add_relu
from resnet_fused.models.resnet import BasicBlock, Bottleneck


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kernel", "options"), [(1, {}), (3, {"padding": 1, "stride": 2}), (3, {"padding": 2, "dilation": 2, "groups": 2})]
)
@pytest.mark.parametrize("with_residual", [True, False])
def test_function_equals_stock(training, kernel, options, with_residual):
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    weight = torch.randn(4, 6 // options.get("groups", 1), kernel, kernel, requires_grad=True)
    gamma, beta = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    stats = [torch.randn(4), torch.rand(4) + 0.5]
    z = F.conv2d(x, weight, **options)
    residual = torch.randn_like(z).requires_grad_() if with_residual else None
    theirs, ours = ([s.clone() for s in stats] for _ in range(2))
    want = F.batch_norm(z, *theirs, gamma, beta, training)
    want = F.relu(want if residual is None else want + residual)
    got = conv_bn_add_relu(x, weight, *ours, gamma, beta, residual, training=training, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    leaves = [t for t in (x, weight, gamma, beta, residual) if t is not None]
    cotangent = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_sample_factor_and_no_relu():
    x, weight = torch.randn(3, 4, 5, 5), torch.randn(4, 4, 1, 1)
    factor = torch.tensor([0.0, 1.0, 2.0])
    got = conv_bn_add_relu(x, weight, None, None, residual=x, training=True, relu=False, sample_factor=factor)
    want = F.batch_norm(F.conv2d(x, weight), None, None, training=True) * factor.view(3, 1, 1, 1) + x
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _args():
    return {
        "x": torch.randn(2, 4, 5, 5),
        "weight": torch.randn(6, 4, 1, 1),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
    }


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.randn(4, 5, 5)}, ValueError, "expected 4D input (got 3D input)"),
        ({"x": torch.randn(2, 3, 5, 5)}, RuntimeError, "to have 4 channels, but got 3 channels instead"),
        ({"x": torch.randn(2, 4, 5, 5).double()}, RuntimeError, "expected scalar type Double but found Float"),
        ({"running_mean": torch.zeros(5)}, RuntimeError, "running_mean should contain 6 elements not 5"),
        ({"bn_weight": torch.zeros(1)}, RuntimeError, "weight should contain 6 elements not 1"),
        ({"running_mean": None}, ValueError, "to be defined when training=False"),
        ({"residual": torch.randn(2, 5, 5, 5)}, ValueError, "pass a residual like that"),
        ({"residual": torch.randn(2, 6, 5, 5).double()}, ValueError, "pass a residual like that"),
        ({"sample_factor": torch.ones(3)}, ValueError, "one for each sample"),
        ({"x": torch.randn(1, 4, 1, 1), "training": True}, ValueError, "Expected more than 1 value per channel"),
        ({"bias": torch.ones(2)}, RuntimeError, "pass [6]"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = _args() | change
    with pytest.raises(error) as info:
        conv_bn_add_relu(**arguments)
    assert text in str(info.value)
    assert arguments["running_var"].eq(1).all()


def test_unknown_backend_and_forced_backend():
    with pytest.raises(ValueError, match="unknown backend 'apex'; pass one of 'auto'"), resnet_fused.use("apex"):
        pass
    with resnet_fused.use("reference"):
        got = conv_bn_add_relu(**_args())
    torch.testing.assert_close(got, conv_bn_add_relu(**_args() | {"x": _args()["x"]}).new_tensor(got.tolist()))


def projection(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


@pytest.mark.parametrize(("fused", "stock"), [(FusedBasicBlock, BasicBlock), (FusedBottleneck, Bottleneck)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_modules_equal_torchvisions_blocks(fused, stock, stride, training):
    outputs = 8 * stock.expansion
    ours = fused(outputs, 8, stride, projection(outputs, outputs, stride) if stride > 1 else None).train(training)
    theirs = stock(outputs, 8, stride, projection(outputs, outputs, stride) if stride > 1 else None).train(training)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, outputs, 8, 8)
    grads = []
    for module in (ours, theirs):
        h = x.clone().requires_grad_()
        out = module(h)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append([out, h.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_conv_bn_relu_module():
    module = FusedConvBNReLU(4, 8, 3, stride=2)
    x = torch.randn(2, 4, 9, 9)
    want = F.relu(F.batch_norm(module.conv(x), None, None, module.bn.weight, module.bn.bias, training=True))
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    residual = torch.randn_like(want)
    assert module.eval()(x, residual).shape == want.shape
    seen = []
    module.bn.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(module(x, residual), F.relu(module.bn(module.conv(x)) + residual))
    assert seen


def test_modules_are_reported_and_left_by_fuse():
    model = nn.Sequential(FusedConvBNReLU(3, 8), FusedBottleneck(8, 8, 1, projection(8, 32, 1)))
    resnet_fused.fuse(model)
    assert [row.what for row in resnet_fused.report(model).fused] == ["built fused", "built fused"]
    assert type(model[1].downsample) is nn.Sequential


def test_constructor_errors_are_torchvisions():
    with pytest.raises(ValueError, match="BasicBlock only supports groups=1 and base_width=64"):
        FusedBasicBlock(8, 8, groups=2)
    with pytest.raises(NotImplementedError, match="Dilation > 1 not supported in BasicBlock"):
        FusedBasicBlock(8, 8, dilation=2)


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (3, 2, 4, 6, 6)])
def test_a_residual_of_another_kind_is_added_as_in_stock(shape):
    """Not in place: what is wider, or of more dimensions, decides the sum's dtype and shape."""
    torch.manual_seed(0)
    layer, x, residual = FusedConvBNReLU(4, 4), torch.randn(2, 4, 6, 6), torch.randn(shape, dtype=torch.float64)
    stock = copy.deepcopy(layer)
    out, want = layer(x, residual), stock.relu(stock.bn(stock.conv(x)) + residual)
    assert out.dtype is want.dtype is torch.float64
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
