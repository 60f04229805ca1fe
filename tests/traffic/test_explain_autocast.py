"""`explain` in 16 bits counts what a step under autocast runs, also of models with frozen norms: beside real steps."""

import pytest
import torch
from nets import block
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.models import BasicBlock
from resnet_fused.plan import devices
from resnet_fused.testing.vision import import_torchvision
from resnet_fused.traffic.calls import calls
from resnet_fused.traffic.count import Counter

vision = import_torchvision()
FROZEN = vision.ops.misc.FrozenBatchNorm2d
SIZE = (4, 16, 56, 56)


class OwnFrozen(nn.Module):
    """Of a class that nobody knows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1), requires_grad=False)

    def forward(self, x):
        return x * self.scale + self.shift


class InEvaluation(nn.BatchNorm2d):
    """Another class too."""

    def train(self, mode=True):
        return super().train(False)


class Timm(nn.Module):
    """timm's norm with an activation, frozen, between convolutions of stock."""

    def __init__(self) -> None:
        super().__init__()
        layers = pytest.importorskip("timm.layers")
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = layers.FrozenBatchNormAct2d(16)

    def forward(self, x):
        return self.b(F.gelu(self.norm(self.a(x)))) + x


def behind(norm):
    """A block of `norm` around stock's parts, and one of usual norms behind it."""
    kind = vision.models.resnet.BasicBlock
    between = [
        nn.Conv2d(16, 16, 1),
        norm(16),
        nn.AvgPool2d(3, 1, 1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
    ]
    return nn.Sequential(kind(16, 16, norm_layer=norm), *between, block(16, 16, kind=BasicBlock))


MODELS = {
    "torchvision": lambda: behind(FROZEN),
    "own": lambda: behind(OwnFrozen),
    "subclass": lambda: behind(InEvaluation),
    "timm": Timm,
    "half": lambda: behind(FROZEN).half(),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_explained(name):
    model = MODELS[name]()
    for dtype, training, device in ((torch.bfloat16, True, "h100"), (torch.float16, False, None)):
        found = resnet_fused.explain(model, SIZE, dtype=dtype, training=training, device=device)
        assert f"Under autocast to {str(dtype).removeprefix('torch.')}," in str(found)
    if name == "half":
        assert "autocast" not in str(resnet_fused.explain(model, SIZE, training=False))


@pytest.mark.parametrize("name", ["torchvision", "own", "timm"])
def test_it_counts_what_a_step_runs(name):
    """In operations, save casts, of which those of weights are not counted."""
    model, counter = MODELS[name](), Counter()
    found = resnet_fused.explain(model, SIZE, dtype=torch.bfloat16, device="h100")
    x = torch.randn(SIZE).contiguous(memory_format=torch.channels_last).requires_grad_(not found.blocks)
    wanted = [t for t in (*model.parameters(), x) if t.requires_grad]
    with counter:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        torch.autograd.grad(out, wanted, torch.empty_like(out))

    def without_casts(operations):
        return [o.name for o in operations if o.name not in ("aten::_to_copy", "aten::copy_")]

    assert without_casts(found.model.stock.operations) == without_casts(counter.total.operations)


def test_frozen_norms_are_left_to_stock_where_they_are_float32():
    model, meta = behind(FROZEN), torch.empty(SIZE, device="meta")
    ops = {}
    for own in (torch.float32, torch.bfloat16):
        found = resnet_fused.explain(model.to(own), SIZE, dtype=torch.bfloat16, device="h100")
        first, last = found.blocks[0], found.blocks[-1]
        assert (first.fused.launches == first.stock.launches) == (own == torch.float32)
        assert first.plan.startswith("stock (a frozen norm's buffers") == (own == torch.float32)
        assert last.fused.bytes < last.stock.bytes
        ops[own] = {call.op for call in calls(model, meta, True, devices.find("h100"), torch.bfloat16)}
    assert "conv_join" not in ops[torch.float32] and "conv_join" in ops[torch.bfloat16]
