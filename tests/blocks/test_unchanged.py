"""The short way past the modules of a site holds for them as they were, and for nothing else."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fused
from resnet_fused.blocks import runtime, site, unchanged
from resnet_fused.blocks.shape import residual_shape
from resnet_fused.blocks.site import Kept, Site, module_obstacle


@pytest.fixture
def modules():
    return nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()


def site_of(modules):
    conv, norm, relu = modules
    shape = residual_shape([("conv", "norm")], bypassed=(("relu", type(relu).__name__),))
    return Site(shape, (conv, norm), (relu,), kept=Kept())


@pytest.fixture
def place(modules):
    found = site_of(modules)
    assert not module_obstacle(found)
    return found


def _swap_class(module):
    module.__class__ = type("Own", (type(module),), {})


def _rename(module):
    module.__dict__["forward"] = module.__dict__.popitem()[1]


def _data(t, value):
    t.data = value


CHANGES = {
    "eps": lambda c, n, r: setattr(n, "eps", 0.5),
    "momentum": lambda c, n, r: setattr(n, "momentum", None),
    "evaluation": lambda c, n, r: n.eval(),
    "tracking": lambda c, n, r: setattr(n, "track_running_stats", False),
    "stride": lambda c, n, r: setattr(c, "stride", (2, 2)),
    "padding mode": lambda c, n, r: setattr(c, "padding_mode", "circular"),
    "an equal setting": lambda c, n, r: setattr(c, "padding", tuple(int(n) for n in "11")),
    "a method": lambda c, n, r: setattr(c, "forward", lambda x: x),
    "another name": lambda c, n, r: _rename(r),
    "an activation's method": lambda c, n, r: setattr(r, "forward", lambda x: x),
    "forward hook": lambda c, n, r: c.register_forward_hook(print),
    "pre-hook": lambda c, n, r: n.register_forward_pre_hook(print),
    "backward hook": lambda c, n, r: r.register_full_backward_hook(print),
    "backward pre-hook": lambda c, n, r: c.register_full_backward_pre_hook(print),
    "weight": lambda c, n, r: setattr(c, "weight", nn.Parameter(c.weight.detach())),
    "bias": lambda c, n, r: setattr(c, "bias", None),
    "buffer": lambda c, n, r: setattr(n, "running_mean", torch.zeros(4)),
    "no buffers": lambda c, n, r: (setattr(n, "running_mean", None), setattr(n, "running_var", None)),
    "another buffer": lambda c, n, r: n.register_buffer("extra", torch.zeros(1)),
    "dtype": lambda c, n, r: _data(c.weight, c.weight.data.double()),
    "shape": lambda c, n, r: _data(c.weight, torch.zeros(5, 4, 3, 3)),
    "strides": lambda c, n, r: _data(c.weight, c.weight.data.transpose(0, 1)),
    "a negated view": lambda c, n, r: _data(n.weight, torch._neg_view(n.weight.data)),
    "no gradient": lambda c, n, r: c.weight.requires_grad_(False),
    "statistics with gradients": lambda c, n, r: n.running_var.requires_grad_(),
    "class": lambda c, n, r: _swap_class(c),
    "shadow": lambda c, n, r: c.__dict__.update(weight=torch.zeros(4, 4, 1, 1)),
    "dictionary": lambda c, n, r: setattr(c, "__dict__", dict(c.__dict__)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(place, modules, change):
    known = place.kept.unchanged
    assert known.holds()
    change(*modules)
    assert not known.holds()
    fresh = site_of(modules)
    assert module_obstacle(place) == module_obstacle(fresh)


def test_modes_change_nothing(place):
    known = place.kept.unchanged
    for scope in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()) * 2:
        assert known.holds()
        with scope:
            assert known.holds()
            assert known.holds()


def test_a_tensor_that_outlived_its_transform_is_read_at_every_call(modules):
    escaped = []
    torch.func.vmap(lambda t: escaped.append(t) or t)(torch.randn(2, 4))
    modules[1]._buffers["running_mean"] = escaped[0]
    place = site_of(modules)
    module_obstacle(place)
    assert not place.kept.unchanged


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(nn.Conv2d, "_conv_forward", lambda *args: None),
        lambda patch: patch.setattr(nn.ReLU, "forward", lambda *args: None),
        lambda patch: patch.setattr(nn.BatchNorm2d, "weight", property(lambda self: None), raising=False),
        lambda patch: patch.setattr(nn.Module, "stride", (7, 7), raising=False),
    ],
    ids=["method", "activation", "property", "attribute of a base"],
)
def test_changes_of_classes_are_seen(place, monkeypatch, change):
    change(monkeypatch)
    assert not place.kept.unchanged.holds()
    monkeypatch.undo()
    assert place.kept.unchanged.holds()


@pytest.mark.parametrize(
    "change",
    [
        lambda c, n, r: setattr(c, "stride", [1, 1]),
        lambda c, n, r: setattr(n, "eps", torch.tensor(1e-5)),
        lambda c, n, r: setattr(n, "notes", []),
        lambda c, n, r: _swap_class(r),
    ],
    ids=["a list", "a tensor", "somebody's attribute", "a subclass"],
)
def test_what_may_change_in_place_is_read_at_every_call(modules, change):
    change(*modules)
    conv, norm, relu = modules
    place = site_of(modules)
    known = module_obstacle(place) or unchanged.Unchanged((conv, norm), (relu,))
    assert isinstance(known, str) or not known.is_complete()
    assert not place.kept.unchanged


def test_fake_tensors_leave_nothing_behind(modules):
    conv, place = modules[0], site_of(modules)
    real = conv.weight
    conv._parameters["weight"] = FakeTensorMode().from_tensor(real)
    module_obstacle(place)
    assert not place.kept.unchanged
    conv._parameters["weight"] = real
    module_obstacle(place)
    assert place.kept.unchanged.holds()


def test_the_short_way_is_taken(place, monkeypatch):
    monkeypatch.setattr(site, "_obstacle_read", lambda site: pytest.fail("was read again"))
    assert not module_obstacle(place)


def test_what_was_read_is_read_again_after_a_change(place, modules):
    conv, norm, _ = modules
    reading, tensors = runtime.read(place)
    again = runtime.read(place)
    assert again[0] is reading
    assert all(a is b for mine, other in zip(again[1], tensors, strict=True) for a, b in zip(mine, other, strict=True))
    norm.momentum = 0.5
    assert runtime.read(place)[0].nodes[1].norm.momentum == 0.5
    norm.momentum = reading.nodes[1].norm.momentum
    conv.weight = nn.Parameter(torch.zeros(4, 4, 3, 3))
    assert runtime.read(place)[1][0].weight is conv.weight
    with resnet_fused.use("reference"):
        assert runtime.read(place)[0].backend == "reference"
    assert runtime.read(place)[0].backend == "auto"
