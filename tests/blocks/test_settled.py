"""What folded inference keeps by one key of a whole chain, from the third call on: every change ends it."""

import copy

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.backends import onednn
from resnet_fused.blocks import kept_evaluation, runtime
from resnet_fused.blocks.site import sites_in
from resnet_fused.convert.swap import STATE
from resnet_fused.library import status
from resnet_fused.models import BasicBlock, Bottleneck
from resnet_fused.plan import choose
from resnet_fused.steps import folding

pytestmark = [
    pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}"),
    pytest.mark.skipif(torch.float32 not in onednn.SERVED, reason=onednn.missing(torch.float32)),
]


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def block(kind=Bottleneck):
    torch.manual_seed(0)
    model = kind(16, 4 if kind is Bottleneck else 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def images(size):
    return torch.randn(1, 16, size, size)


@torch.no_grad()
def settled(model, x):
    """The model after the calls from which on a chain's weights are kept by one key."""
    for _ in range(3):
        model(x)
    return model


def _write(t, value):
    t.data.copy_(value)


AFTERWARDS = {
    "a write past the counter": lambda m: _write(m.conv1.weight, torch.randn_like(m.conv1.weight)),
    "a write to a vector": lambda m: _write(m.bn2.bias, torch.randn_like(m.bn2.bias)),
    "a write to a statistic": lambda m: m.bn3.running_var.mul_(2),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "other strides": lambda m: setattr(m.conv2.weight, "data", m.conv2.weight.data.transpose(2, 3)),
    "another weight": lambda m: setattr(m, "conv3", nn.Conv2d(4, 16, 1, bias=False)),
    "a hook": lambda m: m.bn2.register_forward_hook(lambda module, args, out: out + 1),
    "a method": lambda m: setattr(m.conv2, "forward", lambda x: x * 2),
    "another norm's class": lambda m: setattr(m.bn2, "__class__", Doubled),
    "infinity": lambda m: m.conv1.weight[0, 0].fill_(float("inf")),
}


def one_site(model):
    (site,) = sites_in(model, model.__dict__[STATE].forms[0].shapes, "auto", model.__dict__[STATE].forms[0].modules)
    return site


@pytest.mark.parametrize("size", [6, 4], ids=["packed", "as they are"])
@pytest.mark.parametrize("change", AFTERWARDS.values(), ids=AFTERWARDS)
@torch.no_grad()
def test_what_changes_after_weights_are_settled_is_seen(change, size):
    stock = block()
    model, x = resnet_fused.fuse(copy.deepcopy(stock)), images(size)
    settled(model, x)
    assert len(one_site(model).kept.unchanged.ready) == (size == 4)  # of folded weights the origin is compared first
    for one in (stock, model):
        torch.manual_seed(3)
        change(one)
    for _ in range(3):
        torch.testing.assert_close(model(x), stock(x), rtol=2e-4, atol=2e-4, equal_nan=True)


@torch.no_grad()
def test_settled_weights_are_of_this_shape_and_number_of_threads(monkeypatch):
    model = resnet_fused.fuse(block())
    for size in (6, 10, 6, 10):
        settled(model, images(size))
    recent = kept_evaluation._recent[model.bn3]
    assert recent.settled and recent.case[0] == images(10).shape
    layouts = folding._Layouts()
    monkeypatch.setattr(folding, "_layouts", layouts)  # as if nothing were known: it need not be asked
    model(images(10))
    assert not layouts
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    model(images(10))
    asked = len(layouts)
    model(images(6))
    assert 0 < asked < len(layouts)


@torch.no_grad()
def test_a_mode_sees_the_ops_of_settled_weights():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        sees_fused_ops = True

        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    model = settled(resnet_fused.fuse(block()), images(6))
    with Seen() as seen:
        model(images(6))
    ops = "resnet_fused.conv_add_relu", "resnet_fused.conv_norm_add_relu"
    assert sum(name.startswith(ops) for name in seen.names) == 3


@torch.no_grad()
def test_one_tensor_in_another_place_is_seen():
    """The convolution's bias, handed to its norm as it is: the same tensors in the same order."""
    stock = block(BasicBlock)
    stock.bn1 = nn.BatchNorm2d(16, affine=False).eval()
    stock.bn1.running_var.fill_(4)
    stock.conv1.bias = nn.Parameter(torch.linspace(1, 2, 16))
    model, x = resnet_fused.fuse(copy.deepcopy(stock)), images(6)
    settled(model, x)
    for one in (stock, model):
        one.bn1.bias, one.conv1.bias = one.conv1.bias, None
    for _ in range(3):
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)


AROUND = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another backend": lambda: resnet_fused.use("reference"),
    "a listener": choose.observing,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@torch.no_grad()
def test_a_call_of_few_pixels_is_repeated_only_in_the_same_surroundings(monkeypatch, around):
    stock = block()
    model, x = settled(resnet_fused.fuse(copy.deepcopy(stock)), images(4)), images(4)
    read = []
    monkeypatch.setattr(runtime, "read", lambda *args, original=runtime.read: read.append(1) or original(*args))
    model(x)
    assert not read
    with around():
        got, want = model(x), stock(x)
        assert read and got.requires_grad == want.requires_grad
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(model(x[:, :, :3]), stock(x[:, :, :3]), rtol=1e-4, atol=1e-4)
