"""Dense blocks that are changed before or after fuse(), or are others than they are called: as stock, with a reason."""

import copy
import warnings

import pytest
import torch
from dense_blocks import assert_equal, dense_block, fused, images, ran_fused, step
from torch import nn
from torch.nn.utils import parametrize, prune

import resnet_fused
from resnet_fused.models import densenet


def layer(block):
    return block.denselayer2


def replace_relu(block):
    name, holder = ("act", layer(block).norm1) if hasattr(layer(block).norm1, "act") else ("relu1", layer(block))
    setattr(holder, name, nn.LeakyReLU(0.5))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class OtherConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def other_conv(block):
    conv = OtherConv(8, 4, 3, padding=1, bias=False).double()
    conv.load_state_dict(layer(block).conv2.state_dict())
    layer(block).conv2 = conv


def set_forward(block):
    own = layer(block).forward
    layer(block).forward = lambda features: 2 * own(features)


def with_bias(block):
    layer(block).conv1 = nn.Conv2d(9, 8, 1).double()


def strided(block):
    for one in block.values():
        one.conv2.padding = (2, 2)
        one.conv2.dilation = (2, 2)


CHANGES = {  # what is done to a block, and what the report says of it
    "hook on a layer": (lambda b: layer(b).register_forward_hook(lambda m, i, o: 2 * o), "hooks"),
    "hook on a norm": (lambda b: layer(b).norm2.register_forward_hook(lambda m, i, o: 2 * o), "hooks"),
    "pre-hook on a convolution": (
        lambda b: layer(b).conv2.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
        "hooks",
    ),
    "activation": (replace_relu, ""),
    "forward of a layer": (set_forward, "replaced"),
    "pruned": (lambda b: prune.l1_unstructured(layer(b).conv1, "weight", 0.5), ""),
    "parametrised": (lambda b: parametrize.register_parametrization(layer(b).conv2, "weight", Doubled()), ""),
    "another convolution": (other_conv, "OtherConv"),
    "one layer more": (lambda b: b.add_module("more", copy.deepcopy(b.denselayer3)), "changed after fuse"),
    "one layer fewer": (lambda b: b._modules.pop("denselayer3"), "changed after fuse"),
    "layer replaced": (lambda b: b.add_module("denselayer3", Appended()), "changed after fuse"),
    "group norm": (lambda b: setattr(layer(b), "norm2", nn.GroupNorm(2, 8).double()), ""),
    "odd momentum": (lambda b: setattr(layer(b).norm1, "momentum", torch.tensor(0.2)), "momentum of class Tensor"),
}


class Appended(nn.Module):
    def forward(self, features):
        return features[0][:, :4] * 3


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fuse_run_as_stock(maker, change):
    stock = dense_block(maker)
    block = fused(stock)
    step(block, images()), step(stock, images())
    for one in (stock, block):
        torch.manual_seed(5)
        CHANGES[change][0](one)
    if change == "one layer more":
        x = images()
        for one in (stock, block):
            with pytest.raises(RuntimeError, match=r"running_mean|channels"):
                one(x)
    else:
        got, was_fused = ran_fused(lambda: step(block, images()))
        assert not was_fused
        assert_equal(got, step(stock, images()))
    assert "; 0 of" in str(resnet_fused.report(block)) and CHANGES[change][1] in str(resnet_fused.report(block))


RUN_BY_STOCK = {
    "bias": with_bias,
    "geometry": strided,
}


@pytest.mark.parametrize("change", RUN_BY_STOCK)
def test_what_no_step_takes_is_stock(change):
    stock = dense_block()
    torch.manual_seed(5)
    RUN_BY_STOCK[change](stock)
    block = fused(stock)
    for _ in range(3):
        got, was_fused = ran_fused(lambda: step(block, images()))
        assert not was_fused
        assert_equal(got, step(stock, images()))


@pytest.mark.parametrize("name", ["memory_efficient", "grad_checkpointing"])
def test_memory_efficient_set_later(maker, name):
    stock = dense_block(maker)
    if not hasattr(stock.denselayer1, name):
        pytest.skip("an attribute of other classes")
    block = fused(stock)
    for one in (stock, block):
        for inner in one.values():
            setattr(inner, name, True)
    got, was_fused = ran_fused(lambda: step(block, images()))
    assert not was_fused and f"{name} was changed after fuse" in str(resnet_fused.report(block))
    assert_equal(got, step(stock, images()))
    resnet_fused.fuse(block, backend="reference")
    got, was_fused = ran_fused(lambda: step(block, images()))
    assert was_fused
    assert_equal(got, step(stock, images()))


@pytest.mark.parametrize("where", ["forward", "layer", "code", "cat", "global"])
def test_replaced_code_is_noticed(monkeypatch, where):
    stock = dense_block()
    block = fused(stock)
    kind, inner = densenet.DenseBlock, densenet.DenseLayer

    def halved(self, features):
        return torch.cat([features, self.denselayer1([features])], 1) / 2

    if where == "forward":
        monkeypatch.setattr(kind, "forward", halved)
    elif where == "layer":
        monkeypatch.setattr(inner, "bottleneck", lambda self, *features: self.conv1(torch.cat(features, 1)))
    elif where == "code":
        before = inner.bottleneck.__code__
        inner.bottleneck.__code__ = (lambda self, *features: self.conv1(torch.cat(features, 1))).__code__
    elif where == "cat":
        own = torch.cat
        monkeypatch.setattr(torch, "cat", lambda tensors, dim=0: own(tensors, dim) * 2)
    else:
        monkeypatch.setattr(
            densenet, "torch", type("T", (), {"cat": staticmethod(lambda ts, dim: torch.cat(ts, dim) * 2)})
        )
    try:
        got, was_fused = ran_fused(lambda: step(block, images()))
        assert not was_fused
        assert_equal(got, step(stock, images()))
    finally:
        if where == "code":
            inner.bottleneck.__code__ = before
    assert ran_fused(lambda: monkeypatch.undo() or step(block, images()))[1]


def test_a_class_of_the_name_that_does_something_else(monkeypatch):
    class Impostor(densenet.DenseBlock):
        def forward(self, x):
            return super().forward(x) * 1.5

    Impostor.__module__, Impostor.__qualname__ = densenet.DenseBlock.__module__, densenet.DenseBlock.__qualname__
    stock = Impostor(2, 5, 2, 4, 0.0).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = fused(stock)
    assert "does not compute what a dense block" in str(resnet_fused.report(block))
    assert_equal(step(block, images()), step(stock, images()))


def test_subclasses_are_not_known():
    class Mine(densenet.DenseBlock):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = fused(Mine(2, 5, 2, 4, 0.0))
    assert type(block) is Mine


def test_other_activations_and_norms_stay_stock():
    timm = pytest.importorskip("timm.models.densenet")
    for options in ({"act_layer": nn.SiLU}, {}):
        norm = type("Norm", (timm.BatchNormAct2d,), {}) if not options else None
        make = norm or (lambda n, **more: timm.BatchNormAct2d(n, act_layer=nn.SiLU, **more))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            block = fused(timm.DenseBlock(2, 5, 2, 4, norm_layer=make).double())
        assert type(block) is timm.DenseBlock


def test_sync_batch_norm_stays_stock():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = fused(nn.SyncBatchNorm.convert_sync_batchnorm(dense_block()))
    assert type(block) is densenet.DenseBlock
    assert "SyncBatchNorm" in str(resnet_fused.report(block))
