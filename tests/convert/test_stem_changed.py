"""What is changed in a model with a fused stem, method or child, runs as it would in stock."""

import re

import pytest
import torch
from nets import assert_same, observe
from stems import FORMS, PLAIN, fused_copy, images, make, model_of, outcome
from torch import nn

import resnet_fused

REPLACED = {
    "on the stock class": lambda net, fused: setattr(net, "forward", lambda self, x: x.sum()),
    "on the class of the model": lambda net, fused: setattr(type(fused), "forward", lambda self, x: x.sum()),
    "on the instance": lambda net, fused: setattr(fused, "forward", lambda x: x.sum()),
    "its code": lambda net, fused: setattr(net.forward, "__code__", (lambda self, x: x.sum()).__code__),
}


@pytest.mark.parametrize("place", REPLACED)
def test_a_method_replaced_after_fuse_wins(load, place):
    model = model_of(load, PLAIN)
    fused = fused_copy(model)
    REPLACED[place](type(model), fused)
    assert fused(images()) == images().sum()


@pytest.mark.parametrize("owner", ["Base", "Net"])
def test_a_replaced_method_of_many_arguments_gets_them(load, owner):
    module, _ = load(
        """
def forward(self, x, /, a, b=2, *rest, c, d=4, **others):
    x = self.relu(self.bn1(self.conv1(x)))
    return self.head(x), (a, b, rest, c, d, others)

Base.forward = forward

class Net(Base):
    pass
"""
    )
    model = make(module)
    fused = fused_copy(model, ("conv1-bn1-relu",))
    args, kwargs = (images(), 1, 7, 8, 9), {"c": 3, "e": 5}
    assert fused(*args, **kwargs)[1] == model(*args, **kwargs)[1] == (1, 7, (8, 9), 3, 4, {"e": 5})
    getattr(module, owner).forward = lambda self, *args, **kwargs: (args, kwargs)
    assert "was given another forward" in resnet_fused.report(fused).left[0].reason
    assert fused(*args, **kwargs) == (args, kwargs)


class Counting(nn.BatchNorm2d):
    def forward(self, x):
        self.num_batches_tracked += 100
        return super().forward(x)


def with_class_attribute(model):
    type(model).relu = nn.Tanh()  # found before the child of that name


CHANGES = {
    "no norm": lambda m: delattr(m, "bn1"),
    "no ReLU, behind a norm with effects": lambda m: (setattr(m, "bn1", Counting(4).double()), delattr(m, "relu")),
    "no pool": lambda m: delattr(m, "maxpool"),
    "None": lambda m: setattr(m, "relu", None),
    "a pool that is None": lambda m: setattr(m, "maxpool", None),
    "another activation": lambda m: setattr(m, "relu", nn.Sigmoid()),
    "another pool": lambda m: setattr(m, "maxpool", nn.AvgPool2d(2)),
    "a function": lambda m: (delattr(m, "maxpool"), m.__dict__.update(maxpool=lambda x: x * 2)),
    "a class attribute": with_class_attribute,
    "a Sequential": lambda m: setattr(m, "conv1", nn.Sequential(m.conv1)),
    "an empty Sequential": lambda m: setattr(m, "conv1", nn.Sequential()),
    "other channels": lambda m: setattr(m, "bn1", nn.BatchNorm2d(5).double()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("methods", [PLAIN, FORMS["nested"][0]], ids=["statements", "nested"])
def test_children_changed_after_fuse(load, change, methods):
    model = model_of(load, methods)
    fused = fused_copy(model)
    for each in (model, fused):
        CHANGES[change](each)
    resnet_fused.report(fused)
    got, want = outcome(lambda: fused(images())), outcome(lambda: model(images()))
    if isinstance(want, torch.Tensor):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    else:
        assert (got[0], re.sub("Fused", "", got[1])) == want
    assert_same(fused.state_dict(), model.state_dict(), 1e-8, 1e-8)


def test_fusing_again_after_a_change_takes_what_is_there(load):
    model = model_of(load, PLAIN)
    fused = fused_copy(model)
    for each in (model, fused):
        each.maxpool, each.conv1 = (
            nn.AvgPool2d(2),
            nn.Sequential(each.conv1, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        )
        each.double()
        each.conv1[3].load_state_dict(model.conv1[3].state_dict())
    assert [row.what for row in resnet_fused.report(resnet_fused.fuse(fused)).fused] == ["conv1-bn1-relu"]
    assert_same(observe(fused, images()), observe(model, images()), 1e-8, 1e-8)
    fused.relu = nn.GELU()
    assert "call fuse() again" in resnet_fused.report(fused).left[0].reason
    resnet_fused.fuse(fused)
    assert type(fused) is type(model)
