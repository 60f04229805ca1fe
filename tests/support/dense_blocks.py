"""Small dense blocks of all classes that are known, and what they are compared by."""

import copy

import torch
from torch import nn

import resnet_fused
from resnet_fused.blocks import runtime
from resnet_fused.models.densenet import DenseBlock
from resnet_fused.testing.vision import import_torchvision

LAYERS, ENTERING, BN_SIZE, GROWTH = 3, 5, 2, 4
MAKERS = ("ours", "torchvision", "timm")


def dense_block(maker="ours", memory_efficient=False, drop_rate=0.0, layers=LAYERS):
    """A block in float64 with norms that look trained; None where `maker` is not installed."""
    sizes = {"num_layers": layers, "num_input_features": ENTERING, "bn_size": BN_SIZE, "growth_rate": GROWTH}
    torch.manual_seed(0)
    if maker == "timm":
        from timm.models.densenet import DenseBlock as kind

        block = kind(**sizes, drop_rate=drop_rate, grad_checkpointing=memory_efficient)
    else:
        kind = DenseBlock
        if maker == "torchvision":
            kind = import_torchvision().models.densenet._DenseBlock
        block = kind(**sizes, drop_rate=drop_rate, memory_efficient=memory_efficient)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return block.double()


def fused(block, **options):
    """A fused copy, by the reference where nothing else is asked for."""
    return resnet_fused.fuse(copy.deepcopy(block), **{"backend": "reference", **options})


def images(n=2, size=6, dtype=torch.float64, channels_last=True, channels=ENTERING):
    x = torch.randn(n, channels, size, size + 1, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def step(block, x, wants=True, run=None):
    """Output, all gradients and all buffers of one step, by name."""
    block.zero_grad()
    x = x.detach().requires_grad_(wants)
    out = (run or block)(x)
    seen = {"out": out.detach()}
    if out.requires_grad:
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    seen |= {"x": x.grad} if x.grad is not None else {}
    seen |= {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    return seen | {name: b.clone() for name, b in block.named_buffers()}


def assert_equal(got, want, tolerance=1e-11):
    assert got.keys() == want.keys()
    for name in want:
        a, b = got[name].double(), want[name].double()
        assert got[name].dtype == want[name].dtype and a.shape == b.shape, name
        assert got[name].stride() == want[name].stride(), name
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max()), name


def ran_fused(run):
    """What `run` returns, and whether a program ran in it."""
    before = runtime.fused_programs()
    result = run()
    return result, runtime.fused_programs() > before
