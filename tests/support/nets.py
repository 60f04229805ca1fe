"""Small networks for the converter's tests, and how two of them are compared."""

import copy

import torch
from torch import nn

from resnet_fused.models.resnet import BasicBlock, Bottleneck, ResNet


def small_resnet(**kwargs):
    """A ResNet with one block a stage and trained-looking norms."""
    torch.manual_seed(0)
    model = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def block(inplanes=8, planes=8, stride=1, kind=Bottleneck):
    """One residual block, with a projection where it needs one."""
    torch.manual_seed(0)
    outputs = planes * kind.expansion
    shortcut = None
    if stride != 1 or inplanes != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inplanes, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return kind(inplanes, planes, stride, shortcut)


def thin(model, by):
    """`model` with so many times fewer channels, in bfloat16 but for norms, parameters as after some training."""
    torch.manual_seed(0)
    for module in [*model.modules()]:
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d):
                inputs = layer.in_channels if layer.in_channels == 3 else layer.in_channels // by
                settings = layer.kernel_size, layer.stride, layer.padding
                made = nn.Conv2d(inputs, layer.out_channels // by, *settings, bias=False).bfloat16()
            elif isinstance(layer, nn.BatchNorm2d):
                made = nn.BatchNorm2d(layer.num_features // by)
                for t in (made.weight, made.running_var):
                    nn.init.uniform_(t, 0.5, 1.5)
                for t in (made.bias, made.running_mean):
                    nn.init.normal_(t, 0, 0.3)
            elif isinstance(layer, nn.Linear):
                made = nn.Linear(layer.in_features // by, layer.out_features).bfloat16()
            else:
                continue
            setattr(module, name, made)
    return model.to(memory_format=torch.channels_last)


def images(n=4, channels=8, size=10):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def observe(model, x, run=None):
    """Output, all gradients and all buffers of one step, by name."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    out = (model if run is None else run)(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    seen = {"out": out.detach(), "x": x.grad}
    seen |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return seen | {name: b.clone() for name, b in model.named_buffers()}


def assert_same(got, want, rtol=2e-4, atol=2e-4):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name].float(), want[name].float(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_near(got, want):
    """For whole models, where one ReLU that rounds to the other side moves every gradient before it a little."""
    assert got.keys() == want.keys()
    for name in want:
        a, b = got[name].double(), want[name].double()
        assert (a - b).norm() <= (1e-3 if name == "out" else 5e-2) * b.norm() + 1e-5, name


def pair(model):
    """The model and a fused copy of it."""
    import resnet_fused

    return model, resnet_fused.fuse(copy.deepcopy(model))


__all__ = [
    "BasicBlock",
    "Bottleneck",
    "assert_near",
    "assert_same",
    "block",
    "images",
    "observe",
    "pair",
    "small_resnet",
    "thin",
]
