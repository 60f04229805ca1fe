"""Blocks with a gate, squeeze-excite and its kin, and how a fused one is compared with stock."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.convert.fused_module import FusedModule
from resnet_fused.plan import choose
from resnet_fused.testing.vision import import_torchvision


class Excite(nn.Module):
    """As in many a repository: a pool module, linear layers, views."""

    def __init__(self, c):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(c, 4), nn.ReLU(inplace=True), nn.Linear(4, c), nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Functional(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.first, self.second = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(x, 1)
        y = F.relu(self.first(y))
        return torch.sigmoid(self.second(y)) * x


class InPlaceOnMean(nn.Module):
    """A ReLU writes to the mean itself, and a dropout draws."""

    def __init__(self, c):
        super().__init__()
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.3)

    def forward(self, x):
        return x * self.drop(self.act(x.mean([-1, -2], keepdim=True)))


class OwnConv1d(nn.Module):
    """ECA as its authors spell it."""

    def __init__(self, c):
        super().__init__()
        self.avg_pool, self.sigmoid = nn.AdaptiveAvgPool2d(1), nn.Sigmoid()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.avg_pool(x)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * self.sigmoid(y).expand_as(x)


class Block(nn.Module):
    def __init__(self, c, gate, project=False, spelled="x + shortcut"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)
        self.se = gate(c)
        self.downsample = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)) if project else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        shortcut = x
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.se(self.bn2(self.conv2(x)))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.relu(x)


class NoSum(Block):
    """Nothing is added, and the gate has two readers."""

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.se(self.bn2(self.conv2(x)))
        return x, self.relu(x)


def timms():
    try:
        import_torchvision()
        from timm.layers import CecaModule, EcaModule, EffectiveSEModule, SEModule
    except ImportError:
        return []
    return [
        lambda c: SEModule(c, rd_channels=4),
        lambda c: SEModule(c, rd_channels=4, norm_layer=nn.BatchNorm2d),
        EcaModule,
        lambda c: EcaModule(c, use_mlp=True),
        CecaModule,
        EffectiveSEModule,
    ]


GATES = [Excite, Functional, InPlaceOnMean, OwnConv1d, *timms()]


def scattered(block):
    """In float64, with parameters and statistics that are not those of a new block."""
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1, 1), module.bias.uniform_(-1, 1)
                module.running_mean.uniform_(-1, 1), module.running_var.uniform_(0.5, 2)
    return block.double()


def runs_gate(block, x):
    """What the plan says of a call, in words."""
    with choose.observing() as said:
        block(x)
    return "; ".join(said)


def observe(block, x, call=None):
    """Output, gradients by name and buffers; `call`: how it is called, if not plainly."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    outputs = block(x) if call is None else call(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for i, out in enumerate(outputs):
        weights = torch.linspace(-1, 2 + i, out.numel(), dtype=out.dtype).view(out.shape)
        out.mul(weights).sum().backward(retain_graph=i + 1 < len(outputs))
    found = {f"output {i}": out for i, out in enumerate(outputs)} | {"x": x.grad}
    found |= {name: p.grad for name, p in block.named_parameters()}
    return {**found, **{f"buffer {name}": b for name, b in block.named_buffers()}}


def assert_near(found, expected, rtol=1e-9, atol=1e-11):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        said = f"{name}: {{}}".format
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, equal_nan=True, msg=said)
        if name.startswith("output"):
            sides = [i for i, size in enumerate(value.shape) if size > 1]
            assert [found[name].stride(i) for i in sides] == [value.stride(i) for i in sides]


def assert_same(block, x, train=True, gated=True, edit=lambda block: None, prefer=None):
    stock = copy.deepcopy(block).train(train)
    fused = resnet_fused.fuse(copy.deepcopy(block), prefer=prefer).train(train)
    assert isinstance(fused, FusedModule)
    edit(stock), edit(fused)
    assert ("mean over pixels; opaque" in runs_gate(copy.deepcopy(fused), x)) == gated
    found = observe(fused, x)
    assert_near(found, observe(stock, x))
    return fused


def image(*shape, channels_last=True):
    x = torch.randn(*shape, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x
