"""Pre-activation blocks for the converter's tests, and how fused ones are compared."""

import copy

import torch
from nets import observe
from torch import nn

from resnet_fused.models.preact import PreActBasicBlock, PreActBottleneck
from resnet_fused.plan import choose

F64 = torch.float64


def projection(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


BLOCKS = {
    "bottleneck": lambda: PreActBottleneck(16, 4),
    "projection": lambda: PreActBottleneck(8, 4, 2, projection(8, 16, 2)),
    "basic": lambda: PreActBasicBlock(8, 8),
    "basic with projection": lambda: PreActBasicBlock(8, 12, 2, projection(8, 12, 2)),
    "activated shortcut": lambda: PreActBasicBlock(8, 8, 1, nn.Identity()),
}
CHANNELS = {"bottleneck": 16}


def made(name):
    torch.manual_seed(0)
    block = BLOCKS[name]().double().train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return block, torch.randn(3, CHANNELS.get(name, 8), 6, 6, dtype=F64)


def plan_of(block, x):
    """What the plan says of a step of a copy."""
    with choose.observing() as said:
        copy.deepcopy(block)(x)
    return said


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        wrong, size = ((t.double().abs().sum().item()) for t in (got[name].double() - value.double(), value))
        assert got[name].shape == value.shape and wrong <= 1e-9 * max(1, size), f"{name} is off by {wrong}"


def outcome(block, x, before=lambda h: h):
    """What a step gives, or the error that it raises; twice, as the second may read what the first left."""
    found = []
    for _ in range(2):
        try:
            found.append(observe(block, x, lambda h: block(before(h))))
        except Exception as error:
            found.append((type(error), str(error)[:80]))
    return found
