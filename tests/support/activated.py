"""Blocks with activations other than ReLU, and how they are compared with stock, in float64."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.blocks.runtime import fused_programs

F64 = torch.float64
MODULES = {
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "leaky relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "hardswish": nn.Hardswish,
    "hardswish in place": lambda: nn.Hardswish(inplace=True),
    "relu6": nn.ReLU6,
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
}


class Inverted(nn.Module):
    """A block of MobileNet's kind: 1x1, depthwise 3x3, 1x1, sum."""

    def __init__(self, make, groups=12):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), make()
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1, groups=groups, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(12), make()
        self.conv3, self.bn3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return x + self.bn3(self.conv3(y))


class Functions(nn.Module):
    """Two blocks whose activations are functions with arguments."""

    def __init__(self):
        super().__init__()
        for i in range(1, 6):
            self.add_module(f"conv{i}", nn.Conv2d(6, 6, 3, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(6))

    def forward(self, x):
        x = F.silu(self.bn1(self.conv1(x)), inplace=True)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.3)
        x = F.gelu(self.bn3(self.conv3(x)), approximate="tanh")
        x = F.hardswish(self.bn4(self.conv4(x)))
        return F.relu6(self.bn5(self.conv5(x)), True)


def scattered(model):
    """`model` in float64 with batch norms that do something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.5, 0.5), nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(F64, memory_format=torch.channels_last)


def image(dtype=F64, channels=6):
    x = torch.randn(3, channels, 9, 7, generator=torch.Generator().manual_seed(1), dtype=F64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def observed(model, x):
    """Output, gradients by name, and buffers, after a step."""
    x = x.clone().requires_grad_()
    leaves = {"input": x, **dict(model.named_parameters())}
    out = model(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=F64).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True)), **dict(model.named_buffers())}


def assert_same(fused, stock, x, runs=None):
    before = fused_programs()
    with resnet_fused.use("cpu"):
        got = observed(fused, x)
    ran, want = fused_programs() - before, observed(stock, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert runs is None or ran == runs


def pair(model):
    model = scattered(model)
    return resnet_fused.fuse(copy.deepcopy(model)), model
