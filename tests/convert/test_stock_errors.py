"""What stock refuses, a fused block refuses."""

import contextlib
import copy
import weakref

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.blocks import conv_bn_add_relu
from resnet_fused.convert.fused_module import FusedModule
from resnet_fused.plan import choose


class AddsInPlace(nn.Module):
    """A block whose main branch is smaller than what is added to it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, (5, 1), bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += x
        return self.relu(y)


class Adds(AddsInPlace):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


def fused_block(kind, training):
    stock = kind().train(training)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    assert isinstance(fused, FusedModule)
    return stock, fused


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_adding_in_place_does_not_broadcast_the_result(grad, training):
    x = torch.randn(2, 8, 5, 7)
    with torch.set_grad_enabled(grad):
        for model in fused_block(AddsInPlace, training):
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                model(x)


@pytest.mark.parametrize("training", [True, False])
def test_adding_broadcasts(training):
    stock, fused = fused_block(Adds, training)
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(fused(x), stock(x))


class AddsTwice(nn.Module):
    """One program with two sums, of which the last, of its input, stands apart where stock broadcasts or promotes."""

    def __init__(self, size):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.projection, self.norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, size, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)) + self.norm(self.projection(x)))
        return torch.relu(self.bn3(self.conv3(y)) + x)


@pytest.mark.parametrize("training", [True, False])
def test_the_last_of_two_sums_broadcasts(training):
    stock, fused = fused_block(lambda: AddsTwice((5, 1)).double(), training)
    x = torch.randn(2, 8, 5, 7).double()
    torch.testing.assert_close(fused(x), stock(x))
    with choose.fusing_all(), torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_last_of_two_sums_promotes(training):
    """Under autocast the input is of float32, and so is its sum with what batch norm made."""
    stock, fused = fused_block(lambda: AddsTwice(1), training)
    x = torch.randn(2, 8, 5, 7)
    with choose.fusing_all(), torch.autocast("cpu", torch.bfloat16):
        got, want = fused(x), stock(x)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


class Square(Adds):
    """A block that fuses its addition."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)


class Plain(Square):
    """Nothing is added: the mask of its ReLU is not saved, but made again."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Bare(Square):
    """Without a ReLU behind it: stock saves nothing that leaves it."""

    def forward(self, x):
        return self.bn(self.conv(x)) + x


class Pooled(Square):
    """Stock's pool saves what it is given, and where the largest stood."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


def write(out):
    out.add_(1)


def write_to_a_part(out):
    out[:, :1].zero_()


def write_by_an_alias(out):
    out.detach().mul_(2)


def write_in_inference_mode(out):
    with torch.inference_mode():
        out.add_(1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Square, Plain])
@pytest.mark.parametrize("change", [write, write_to_a_part, write_by_an_alias, write_in_inference_mode])
def test_what_a_relu_gave_is_not_written_to_before_backward(kind, training, layout, change):
    x = torch.randn(2, 8, 5, 7).to(memory_format=layout)
    for model in fused_block(kind, training):
        model.to(memory_format=layout)
        out = model(x)
        change(out)
        with pytest.raises(RuntimeError, match="needed for gradient computation has been modified by an inplace"):
            out.sum().backward()
        model(x).sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", [Bare, Pooled])
def test_what_no_relu_gave_may_be_written_to(kind, layout):
    x = torch.randn(2, 8, 5, 7).to(memory_format=layout)
    for model in fused_block(kind, True):
        out = model.to(memory_format=layout)(x)
        out.mul_(2)
        out.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.num_batches_tracked"])
def test_tensors_made_in_inference_mode(name, training):
    """Stock saves some of them, writes to others, and has no objection to a bias."""
    outcomes, (owner, tensor) = [], name.split(".")
    for model in fused_block(Square, training):
        module = model.get_submodule(owner)
        kept = module._buffers if tensor in module._buffers else module._parameters
        with torch.inference_mode():
            kept[tensor] = kept[tensor].detach().clone()
        try:
            out = model(torch.ones(2, 8, 5, 7, requires_grad=True))
            out.sum().backward()
            outcomes.append("runs")
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert (outcomes[0] == "runs") == (name == "bn.bias" or (not training and name == "bn.num_batches_tracked"))


@pytest.mark.parametrize("relu", [True, False])
def test_a_functions_result_is_watched_where_a_relu_gave_it(relu):
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    out = conv_bn_add_relu(x, weight, None, None, training=True, relu=relu).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace") if relu else contextlib.nullcontext():
        out.sum().backward()


def test_watching_keeps_no_memory():
    """Of what is handed out, the copy that leaves in stock's layout is not kept as well."""
    x = torch.randn(2, 8, 5, 7)
    _, fused = fused_block(Square, True)
    out = fused(x)
    copied = weakref.ref(out.untyped_storage())
    total = out.sum()
    assert copied() is not None
    del out
    assert copied() is None
    total.backward()
