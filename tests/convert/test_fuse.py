"""What `fuse` promises: in place, idempotent, undone by `unfuse`, and honest about what it leaves."""

import copy
import io
import pickle
import random
import warnings

import pytest
import torch
from nets import BasicBlock, Bottleneck, assert_near, assert_same, block, images, observe, pair, small_resnet
from torch import nn

import resnet_fused
from resnet_fused.convert.fused_module import FusedModule


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("inplanes", "planes", "stride"), [(8, 8, 1), (32, 8, 1), (8, 8, 2), (12, 5, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_equals_stock(kind, inplanes, planes, stride, training):
    stock, fused = pair(block(inplanes, planes, stride, kind).train(training))
    assert isinstance(fused, FusedModule) and isinstance(fused, kind)
    assert_same(observe(fused, images(channels=inplanes)), observe(stock, images(channels=inplanes)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_groups_width_and_dilation(groups, dilation):
    torch.manual_seed(0)
    stock, fused = pair(Bottleneck(32, 8, groups=groups, base_width=32, dilation=dilation))
    assert_same(observe(fused, images(channels=32)), observe(stock, images(channels=32)))


def test_a_whole_model_with_its_stem():
    stock, fused = pair(small_resnet())
    assert_near(observe(fused, images(channels=3, size=64)), observe(stock, images(channels=3, size=64)))
    assert {row.name for row in resnet_fused.report(fused).fused} == {
        "", "layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0",
    }  # fmt: skip
    assert not resnet_fused.report(fused).left


def test_parameters_keep_identity_and_state_dict_loads_both_ways():
    model = small_resnet()
    before = dict(model.named_parameters()), list(model.state_dict())
    assert resnet_fused.fuse(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before[0]) and all(after[name] is before[0][name] for name in after)
    assert list(model.state_dict()) == before[1]
    fresh = small_resnet()
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(fresh.state_dict(), strict=True)


def test_fuse_and_unfuse_are_idempotent():
    model = small_resnet()
    classes = [type(m) for m in model.modules()]
    resnet_fused.fuse(model)
    fused = [type(m) for m in model.modules()]
    resnet_fused.fuse(model)
    assert [type(m) for m in model.modules()] == fused != classes
    resnet_fused.unfuse(resnet_fused.unfuse(model))
    assert [type(m) for m in model.modules()] == classes
    assert not any("_resnet_fused" in vars(m) for m in model.modules())


def test_filter_fn_and_backend():
    model = resnet_fused.fuse(
        small_resnet(), filter_fn=lambda name, module: name.startswith("layer1"), backend="reference"
    )
    assert [row.name for row in resnet_fused.report(model).fused] == ["layer1.0"]
    assert "fuse() was not called on it" in str(resnet_fused.report(model))
    with pytest.raises(ValueError, match="unknown backend 'nope'; pass one of 'auto'"):
        resnet_fused.fuse(model, backend="nope")


def test_what_a_fused_module_runs_is_no_business_of_a_second_call():
    """A block that a second call leaves out keeps its shortcut, a Sequential that could be fused alone."""
    model = resnet_fused.fuse(small_resnet())
    before = str(resnet_fused.report(model))
    resnet_fused.fuse(model, filter_fn=lambda name, module: name != "layer2.0")
    assert str(resnet_fused.report(model)) == before


def test_nothing_to_fuse():
    with pytest.warns(UserWarning, match="nothing to fuse in Sequential"):
        resnet_fused.fuse(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="nothing to fuse"):
        resnet_fused.fuse(nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1)), strict=True)
    with pytest.raises(TypeError, match=r"pass a torch\.nn\.Module"):
        resnet_fused.fuse("resnet50")


class Own(nn.Module):
    """A block as somebody would write it, functional ReLU and other names."""

    def __init__(self, channels=8):
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.b, self.b_norm = nn.Conv2d(channels, channels, 3, padding="same"), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = torch.relu(self.a_norm(self.a(x)))
        return torch.relu(x + self.b_norm(self.b(y)))


def test_own_blocks_are_recognised_by_structure():
    torch.manual_seed(0)
    stock, fused = pair(Own())
    assert resnet_fused.report(fused).fused[0].what == "a-a_norm-relu-b-b_norm + x -> relu"
    assert_same(observe(fused, images()), observe(stock, images()))


class Flips(Own):
    def forward(self, x):
        return super().forward(x) if random.random() < 2 else x


class Drops(Own):
    def forward(self, x):
        y = self.a_norm(self.a(x))
        return torch.relu(y) if self.training else y


class Draws(Own):
    def forward(self, x):
        return torch.relu(self.a_norm(self.a(x))) * torch.rand(1)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Flips, "super()"), (Drops, "branches on self.training"), (Draws, "its forward uses rand")]
)
def test_forwards_that_tracing_would_freeze_are_left(kind, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = resnet_fused.fuse(kind())
    assert type(model) is kind
    assert reason in resnet_fused.report(model).left[0].reason


def test_deepcopy_pickle_and_save():
    model = resnet_fused.fuse(small_resnet()).eval()
    x = images(channels=3, size=32)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert resnet_fused.report(other) == resnet_fused.report(model)
        with torch.no_grad():
            assert torch.equal(other(x), model(x))
            other.layer1[0].conv1.weight.mul_(2)
            assert not torch.equal(other(x), model(x))


def test_a_block_changed_after_fuse_runs_stock():
    stock, fused = pair(block())
    for model in (stock, fused):
        model.downsample.append(nn.Dropout(0.0))
    assert "was changed after fuse()" in resnet_fused.report(fused).left[0].reason
    assert_same(observe(fused, images()), observe(stock, images()), 0, 0)
    resnet_fused.fuse(fused)


def test_an_inference_cache_follows_every_kind_of_write():
    stock, fused = pair(block().eval())
    x = images()
    writes = [
        lambda m: m.conv1.weight.data.mul_(1.5),  # past the version counter
        lambda m: m.bn2.running_mean.add_(1),
        lambda m: m.bn1.weight.data.copy_(m.bn1.weight.flip(0)),
        lambda m: m.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in m.state_dict().items()}),
        lambda m: setattr(m, "conv3", nn.Conv2d(8, 32, 1, bias=False).requires_grad_(False)),
        lambda m: m.conv1.weight.data.copy_(m.conv1.weight[:, torch.randperm(8)]),
    ]
    for write in writes:
        for model in (stock, fused):
            torch.manual_seed(3)
            with torch.no_grad():
                model(x)
                write(model)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
