"""What evaluation keeps of a whole block, by the form of a call from the second on, and what is folded of its weights
from the third on: every change ends it."""

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
from resnet_fused.plan.choose import setting
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
    "a step of an optimizer": lambda m: stepped(m),
    "a state": lambda m: m.load_state_dict({name: t + (t.is_floating_point()) for name, t in m.state_dict().items()}),
    "a bias": lambda m: setattr(m.conv2, "bias", nn.Parameter(torch.ones(4))),
    "training": lambda m: m.train(),
    "training of one norm": lambda m: m.bn2.train(),
    "no statistics": lambda m: (setattr(m.bn1, "running_mean", None), setattr(m.bn1, "running_var", None)),
    "another norm": lambda m: setattr(m, "bn1", nn.BatchNorm2d(4).eval()),
    "another dtype": lambda m: m.double(),
}


def stepped(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1).step()


def sites_of(model):
    form = model.__dict__[STATE].forms[0]
    return sites_in(model, form.shapes, "auto", form.modules)


@pytest.mark.parametrize("size", [6, 4], ids=["packed", "as they are"])
@pytest.mark.parametrize("change", AFTERWARDS.values(), ids=AFTERWARDS)
@torch.no_grad()
def test_what_changes_after_weights_are_settled_is_seen(change, size):
    stock = block()
    model, x = resnet_fused.fuse(copy.deepcopy(stock)), images(size)
    settled(model, x)
    assert [len(site.kept.unchanged.ready) for site in sites_of(model)] == [1]
    for one in (stock, model):
        torch.manual_seed(3)
        change(one)
    x = x.to(stock.conv1.weight.dtype)
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
    "inference mode": torch.inference_mode,
    "another precision": lambda: resnet_fused.precision("fast"),
    "another number of threads": lambda: setting(torch, "get_num_threads", lambda: 97),
}


@pytest.mark.parametrize("size", [6, 4], ids=["packed", "as they are"])
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@torch.no_grad()
def test_a_call_is_repeated_only_in_the_same_surroundings(monkeypatch, around, size):
    stock = block()
    model, x = resnet_fused.fuse(copy.deepcopy(stock)), images(size)
    planned = planning(monkeypatch)
    model(x)
    assert planned
    planned.clear()
    for _ in range(3):  # with weights of the first shape, packed for this one, and settled
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)
    assert not planned
    with around():
        got, want = model(x), stock(x)
        assert planned and got.requires_grad == want.requires_grad
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(model(x[:, :, :3]), stock(x[:, :, :3]), rtol=1e-4, atol=1e-4)


def planning(monkeypatch):
    """The calls, from now on, that read modules as a program or look for its steps."""
    found = []
    for module, name in ((runtime, "read"), (kept_evaluation, "_steps_of")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, original=original: found.append(1) or original(*args))
    return found


class Own(torch.Tensor):
    pass


def _forward_mode(model, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.stack(torch.autograd.forward_ad.unpack_dual(model(dual)))


GIVEN = {
    "another size": lambda model, x: model(x[:, :, :5]),
    "another layout": lambda model, x: model(x.contiguous(memory_format=torch.channels_last)),
    "strides": lambda model, x: model(x.transpose(2, 3)),
    "a parameter": lambda model, x: model(nn.Parameter(x)),
    "a subclass": lambda model, x: model(x.as_subclass(Own)),
    "a negated view": lambda model, x: model(torch._neg_view(x)),
    "vmap": lambda model, x: torch.func.vmap(model)(x[None]),
    "forward mode": _forward_mode,
    "compile": lambda model, x: torch.compile(model, backend="eager")(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "trace": lambda model, x: torch.jit.trace(model, x, check_trace=False)(x),
    "expanded": lambda model, x: model(x[:, :1].expand(-1, 16, -1, -1)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@torch.no_grad()
def test_what_is_given_in_another_way_is_seen(given):
    stock, x = block(), images(6)
    model = settled(resnet_fused.fuse(copy.deepcopy(stock)), x)
    got, want = given(model, x), given(stock, x)
    assert type(got) is type(want) and got.requires_grad == want.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)


class Meddles(nn.Module):
    """Runs between two programs of its block, and may change what the second reads."""

    change = staticmethod(lambda: None)

    def forward(self, x):
        self.change()
        return torch.sin(x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.between = nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), Meddles()
        self.conv2, self.bn2, self.relu = nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()

    def forward(self, x):
        h = self.between(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(self.conv2(h)) + x)


BETWEEN = {
    "strides": lambda m: setattr(m.conv2.weight, "data", m.conv2.weight.data.transpose(2, 3)),
    "content": lambda m: _write(m.bn2.bias, m.bn2.bias + 1),
    "eps": lambda m: setattr(m.bn2, "eps", m.bn2.eps + 0.1),
    "gradients": lambda m: m.conv2.weight.requires_grad_(True),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
def test_what_changes_between_two_programs_of_a_block_is_seen(change):
    torch.manual_seed(0)
    stock = Two().eval().requires_grad_(False)
    model, x = resnet_fused.fuse(copy.deepcopy(stock)), images(6)
    with choose.fusing_all():
        for _ in range(3):
            model(x)
        assert all(site.kept.unchanged.ready for site in sites_of(model)) and len(sites_of(model)) == 2
        for one in (stock, model):
            one.between.change = lambda one=one: change(one)
        got, want = model(x), stock(x)
        assert got.requires_grad == want.requires_grad
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
