"""Forwards of the same nodes in unusual graphs and states: one program with stock's numbers, or stock."""

import copy

import pytest
import torch
from nets import images, observe
from preact_blocks import F64, assert_equal, made, outcome, plan_of
from torch import nn

import resnet_fused


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.conv1, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.bn2, self.relu, self.inplace = nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU(inplace=True)


class WritesToItsInput(Sums):
    def forward(self, x):
        return self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn(self.inplace(x))))))) + x


class AddsInPlaceToTheShortcut(Sums):
    def forward(self, x):
        shortcut = self.relu(self.bn(x))
        branch = self.conv2(self.relu(self.bn2(self.conv1(shortcut))))
        shortcut += branch
        return shortcut


class ClampsWhatIsReadBefore(Sums):
    def forward(self, x):
        y = self.bn(x)
        z = self.conv1(self.inplace(y))
        return self.conv2(self.relu(self.bn2(z))) + y


class RunsANormTwice(Sums):
    def forward(self, x):
        return self.conv2(self.relu(self.bn(self.conv1(self.relu(self.bn(x)))))) + x


class Multiplies(Sums):
    def forward(self, x):
        return self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn(x)))))) * x


class AddsAlpha(Sums):
    def forward(self, x):
        return torch.add(self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn(x)))))), x, alpha=2)


class KeepsAnother(Sums):
    def forward(self, x):
        y = self.relu(self.bn(x))
        self.conv2(self.relu(self.bn2(self.conv1(y)))) + x
        return y


NEARLY = [
    WritesToItsInput, AddsInPlaceToTheShortcut, ClampsWhatIsReadBefore, RunsANormTwice, Multiplies, AddsAlpha,
    KeepsAnother,
]  # fmt: skip


@pytest.mark.parametrize("kind", NEARLY)
def test_what_is_nearly_a_program_has_stocks_numbers(kind):
    torch.manual_seed(0)
    block, x = kind().double().train(), images().double()
    fused = resnet_fused.fuse(copy.deepcopy(block))
    (row,) = (report := resnet_fused.report(fused)).rows
    assert not report.fused or row.passes.fused < row.passes.total or "[" in row.what  # parts of it may be fused
    for a, b in zip(outcome(fused, x, lambda h: h * 1), outcome(block, x, lambda h: h * 1), strict=True):
        assert a[0] == b[0] if isinstance(b, tuple) else assert_equal(a, b) is None


class Blocks(nn.Module):
    """Norms, convolutions and a drop path to write forwards of."""

    def __init__(self, drop=None):
        super().__init__()
        for i in range(4):
            setattr(self, f"b{i}", nn.BatchNorm2d(8))
            setattr(self, f"c{i}", nn.Conv2d(8, 8, 3, padding=1))
            setattr(self, f"s{i}", nn.Conv2d(8, 8, 1, 2))
        self.relu, self.dp = nn.ReLU(), drop


class DropsTheSum(Blocks):
    def forward(self, x):
        return self.dp(self.c1(self.relu(self.b1(self.c0(self.relu(self.b0(x)))))) + x)


class DropsAnActivation(Blocks):
    def forward(self, x):
        return self.c1(self.dp(self.relu(self.b1(self.c0(self.relu(self.b0(x))))))) + x


class DropsWhatIsReadOn(Blocks):
    def forward(self, x):
        h = self.dp(self.c1(self.relu(self.b1(self.c0(self.relu(self.b0(x)))))) + x)
        return self.c2(self.relu(self.b2(h))) + h


@pytest.mark.parametrize("kind", [DropsTheSum, DropsAnActivation, DropsWhatIsReadOn])
def test_a_drop_path_that_no_addition_follows_is_called(kind):
    from resnet_fused.testing.vision import import_torchvision

    import_torchvision()
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    block, x = kind(layers.DropPath(0.5)).double().train(), images(6).double()
    assert_equal(observe(resnet_fused.fuse(copy.deepcopy(block)), x), observe(block, x))


class Separable(Blocks):
    def forward(self, x):
        return self.c2(self.c1(self.relu(self.b1(self.c3(self.c0(self.relu(self.b0(x)))))))) + x


class ReadRawTwice(Blocks):
    def forward(self, x):
        a = self.c0(self.relu(self.b0(x)))
        return self.c2(self.relu(self.b1(a))) + self.c1(a)


class OtherStrides(Blocks):
    def forward(self, x):
        v = self.relu(self.b0(x))
        return self.s2(self.relu(self.b1(self.s0(v)))) + self.s3(self.s1(v))


class SumsReadByStrides(Blocks):
    def forward(self, x):
        h = self.c1(self.relu(self.b1(self.c0(self.relu(self.b0(x)))))) + x
        return self.s0(h) + self.s1(x)


class TwoUnits(Blocks):
    def forward(self, x):
        h = self.relu(self.c0(self.relu(self.b0(x))) + x)
        return self.c2(self.relu(self.b2(self.c1(self.relu(self.b1(h)))))) + h


class OtherFirst(Blocks):
    def forward(self, x):
        return x + self.c1(self.relu(self.b1(self.c0(self.relu(self.b0(x))))))


class DeadSum(Blocks):
    def forward(self, x):
        v = self.relu(self.b0(x))
        u = self.relu(self.c3(v) + x)  # noqa: F841
        return self.c1(self.relu(self.b1(self.c0(v)))) + x


class PostActivation(Blocks):
    def forward(self, x):
        h = self.b1(self.c1(self.relu(self.b0(self.c0(x)))))
        return self.c2(self.relu(self.b3(h + self.b2(self.c3(x))))) + x


FROZEN = [(), ("b0", "c0"), ("b2", "c3"), ("b0", "b1", "b2", "b3"), ("c0", "c1", "b0", "b1", "s0")]
GRAPHS = [PostActivation, Separable, ReadRawTwice, OtherStrides, SumsReadByStrides, TwoUnits, OtherFirst, DeadSum]


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize(
    "frozen", [(), ("b0", "c0"), ("b2", "c3"), ("b0", "b1", "b2", "b3"), ("c0", "c1", "b0", "b1", "s0")]
)
def test_other_graphs_of_the_same_nodes(kind, frozen):
    torch.manual_seed(0)
    block, x = kind().double().train(), images(4, size=8).double()
    for name in frozen:
        getattr(block, name).requires_grad_(False)
    fused = resnet_fused.fuse(copy.deepcopy(block))
    assert_equal(observe(fused, x), observe(block, x))
    without = x.detach()
    for a, b in zip(fused(without).flatten(1).std(1), block(without).flatten(1).std(1), strict=True):
        torch.testing.assert_close(a, b)
    got, want = fused(without), block(without)
    assert got.requires_grad == want.requires_grad
    if want.requires_grad:
        got.square().sum().backward(), want.square().sum().backward()
        for (name, p), q in zip(block.named_parameters(), fused.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-9), name


def test_a_norm_without_weight_keeps_the_gradient_of_its_bias():
    block, x = made("bottleneck")
    block.bn2.weight = None
    fused = resnet_fused.fuse(copy.deepcopy(block))
    assert_equal(observe(fused, x), observe(block, x))


@pytest.mark.parametrize("write", [lambda x: x.copy_(x + 1), lambda x: x.data.zero_()])
def test_an_input_that_stock_does_not_save_may_be_written_to(write):
    block, x = made("bottleneck")
    block.bn1.requires_grad_(False)
    fused = resnet_fused.fuse(copy.deepcopy(block))
    x = x.contiguous(memory_format=torch.channels_last)
    for side in (fused, block):
        h = x.clone()
        out = side(h)
        with torch.no_grad():
            write(h)
        out.square().sum().backward()
    for (name, p), q in zip(block.named_parameters(), fused.parameters(), strict=True):
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-9), name


def test_backward_by_stock_operations_is_not_autocast():
    block, x = made("bottleneck")
    block, x = block.float(), x.float().requires_grad_()
    fused = resnet_fused.fuse(copy.deepcopy(block))
    grads = []
    for side in (fused, block):
        out = side(x)
        with torch.autocast("cpu", torch.bfloat16):
            grads += torch.autograd.grad(out.sum(), x, create_graph=True)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lasts", [True, False])
def test_a_sum_has_the_layout_of_what_stock_takes_first(lasts):
    torch.manual_seed(0)
    block, x = OtherFirst().double().train(), images().double()
    block = block.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last) if lasts else x
    assert resnet_fused.fuse(copy.deepcopy(block))(x).stride() == block(x).stride()


def _one_number(block):
    block.conv2.stride = (1,)


def _no_stride(block):
    block.conv2.stride = (0, 0)


def _mixed_norm(block):
    block.to(torch.bfloat16)
    block.bn1.running_mean = block.bn1.running_mean.float()


def _inference_statistics(block):
    with torch.inference_mode():
        block.bn1.running_mean = torch.zeros(16, dtype=F64)


def _no_statistics(block):
    for norm in (block.bn1, block.bn2):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    block.eval()


@pytest.mark.parametrize("change", [_one_number, _no_stride, _mixed_norm, _inference_statistics, _no_statistics])
def test_odd_settings_are_stocks(change):
    block, x = made("bottleneck")
    fused = resnet_fused.fuse(copy.deepcopy(block))
    for side in (fused, block):
        change(side)
    x = x.to(block.conv1.weight.dtype)
    for a, b in zip(outcome(fused, x), outcome(block, x), strict=True):
        assert a[0] == b[0] if isinstance(b, tuple) else assert_equal(a, b) is None


class Wide(nn.Module):
    """The first convolution that a norm follows reads another width than the block."""

    def __init__(self):
        super().__init__()
        self.b1, self.b2, self.b3 = nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.wide, self.down = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)
        self.c2, self.c3, self.relu = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.ReLU()

    def forward(self, x):
        v = self.relu(self.b1(x))
        h = self.wide(v) + self.down(v)
        return self.c3(self.relu(self.b3(self.c2(self.relu(self.b2(h)))))) + h


def test_a_block_may_read_another_width_than_its_first_chain():
    torch.manual_seed(0)
    block, x = Wide().double().train(), images().double()
    fused = resnet_fused.fuse(copy.deepcopy(block))
    assert any("norm on load" in text for text in plan_of(fused, x))
    assert_equal(observe(fused, x), observe(block, x))
    assert resnet_fused.report(fused).fused[0].what.endswith("c3 + sum")
    for a, b in zip(outcome(fused, images(channels=16)), outcome(block, images(channels=16)), strict=True):
        assert a[0] == b[0]
