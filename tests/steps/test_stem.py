"""Where convolutions of few channels run by their own loops in training, and what is made of the gradient there."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.plan import choose
from resnet_fused.steps import Conv, conv, kinds, stem

pytestmark = pytest.mark.skipif(not stem.IS_BUILT, reason="no compiled library for AVX2 or AVX-512")
SEVEN = Conv((2, 2), (3, 3))


def image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def seen(monkeypatch):
    """Ops that were run."""
    ops = []
    for module in (conv, stem, kinds):
        run = module.run
        monkeypatch.setattr(module, "run", lambda op, *args, run=run, **kw: ops.append(op) or run(op, *args, **kw))
    return ops


class Stem(nn.Module):
    def __init__(self, outputs=32, bias=False, pool=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.relu = nn.Conv2d(3, outputs, 7, 2, 3, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        ((32, 5, 3, 3), Conv(padding=(1, 1))),
        ((33, 3, 3, 3), Conv(padding=(1, 1))),
        ((32, 3, 1, 1), Conv()),
        ((32, 3, 3, 3), Conv(padding=(2, 2), dilation=(2, 2))),
        ((32, 1, 3, 3), Conv(padding=(1, 1), groups=2)),
    ],
    ids=str,
)
def test_is_not_taken(kernel, geometry):
    arguments = image(2, 3, 9, 9), image(*kernel), geometry, "auto"
    assert not stem.takes(*arguments) and not stem.takes_gradient(*arguments)


@pytest.mark.parametrize(("channels", "taken"), [(1, True), (3, False)])
def test_short_sums_are_taken_backward_alone_but_of_one_channel_with_avx512(channels, taken, monkeypatch):
    monkeypatch.setattr(stem, "_WINDOW", 25)
    arguments = image(2, channels, 9, 9), image(32, channels, 3, 3), Conv(padding=(1, 1)), "auto"
    assert stem.takes(*arguments) is taken and stem.takes_gradient(*arguments)


@pytest.mark.parametrize("statistics", [False, True])
def test_the_convolution_emits_its_statistics(statistics, seen):
    x, weight = image(2, 3, 33, 30), image(32, 3, 7, 7)
    z, moments = conv.conv2d(x, weight, None, SEVEN, "auto", statistics)
    assert seen == ["stem_conv"] and (moments is not None) is statistics
    torch.testing.assert_close(z, F.conv2d(x, weight, None, 2, 3), rtol=1e-4, atol=1e-4)
    for other in (x.double(), x.contiguous(), x.bfloat16()):
        assert not stem.takes(other, weight.to(other.dtype), SEVEN, "auto")
    assert not stem.takes(x, weight, SEVEN, "reference")


def trained(model, x, target):
    """Output and gradients."""
    leaves = [*model.parameters(), *([x] if x.requires_grad else [])]
    out = model(x)
    return out, torch.autograd.grad((out * target).sum(), leaves)


@pytest.mark.parametrize("wants_image", [False, True], ids=["parameters", "and the image"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no pool"])
def test_a_stem_in_training(pool, bias, wants_image, seen):
    model, x = Stem(bias=bias, pool=pool).to(memory_format=torch.channels_last), image(2, 3, 45, 38)
    exact = Stem(bias=bias, pool=pool).double()
    stock = Stem(bias=bias, pool=pool).to(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(model)
    target = torch.randn_like(stock(x))
    with choose.fusing_all():
        found = [
            trained(m, x.to(t.dtype).requires_grad_(wants_image), t)
            for m, t in ((exact, target.double()), (stock, target), (fused, target))
        ]
    alone = pool and not bias and not wants_image
    assert ("stem_pool_wgrad" in seen) is alone and ("stem_conv_wgrad" in seen) is not alone
    assert ("norm_relu_pool_apply" in seen) is (pool and not alone)
    for right, theirs, ours in zip(*([out, *grads] for out, grads in found), strict=True):
        assert ours.shape == theirs.shape
        scale = right.abs().max() + 1e-3
        assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + 2e-6 * scale
    assert found[1][1][0].stride() == found[2][1][0].stride()


def test_a_frozen_weight_makes_no_gradient(seen):
    fused, x = resnet_fused.fuse(Stem().to(memory_format=torch.channels_last)), image(2, 3, 45, 38)
    fused.conv.weight.requires_grad_(False)
    with choose.fusing_all():
        fused(x).sum().backward()
    assert not any("wgrad" in op or "apply" in op for op in seen) and fused.bn.weight.grad is not None


def test_a_second_backward_runs_through_stocks_operations():
    fused, x = resnet_fused.fuse(Stem().to(memory_format=torch.channels_last)), image(2, 3, 45, 38)
    stock, results = Stem().to(memory_format=torch.channels_last), []
    with choose.fusing_all():
        for model in (stock, fused):
            (grad,) = torch.autograd.grad(model(x).square().sum(), model.conv.weight, create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), model.bn.weight)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_into_one_graph(training):
    """With its pool: whether that runs in the program depends on the compiled library, which no graph can load."""
    stock, fused = (Stem().to(memory_format=torch.channels_last).train(training) for _ in range(2))
    resnet_fused.fuse(fused)
    x, results = image(2, 3, 45, 38), []
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.set_grad_enabled(training), choose.fusing_all():
        for model in (stock, compiled):
            results.append(model(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    if training:
        found = [torch.autograd.grad(y.sum(), m.conv.weight)[0] for y, m in zip(results, (stock, fused), strict=True)]
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
