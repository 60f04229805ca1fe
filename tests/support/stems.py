"""Models with a stem, as classes and as source, and what a fused copy of one must do."""

import copy
import textwrap

import pytest
import torch
from nets import BasicBlock, assert_same, observe
from torch import nn

import resnet_fused

HEAD = """
from __future__ import annotations
import torch
from torch import nn
from torch.nn import functional as F

class Base(nn.Module):
    SCALE = 3.0

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.maxpool, self.fc = nn.MaxPool2d(2), nn.Linear(4, 2)

    def head(self, x):
        return self.fc(F.dropout(x, 0.0, self.training).mean((2, 3)))
"""
PLAIN = """
    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.head(x)
"""


def model_of(load, methods, base="Base"):
    """A model of class ``Net`` with `methods`."""
    module, _ = load(f"\nclass Net({base}):\n" + textwrap.indent(textwrap.dedent(methods), "    "))
    return make(module)


def make(module):
    torch.manual_seed(0)
    return module.Net().double()


def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def fused_copy(model, stems=("conv1-bn1-relu-maxpool",)):
    fused = resnet_fused.fuse(copy.deepcopy(model)) if stems else copy.deepcopy(model)
    rows = [row for row in resnet_fused.report(fused).fused if not row.name]
    assert [row.what for row in rows] == [", ".join(stems)] if stems else not rows
    return fused


def assert_stays_stock(model):
    with pytest.warns(UserWarning, match="nothing to fuse"):
        fused = resnet_fused.fuse(copy.deepcopy(model))
    assert type(fused) is type(model)


def outcome(run):
    """What `run` returns, or the kind and text of what it raises."""
    try:
        return run()
    except Exception as error:
        return type(error), str(error)


FORMS = {
    "statements": (PLAIN, "conv1-bn1-relu-maxpool"),
    "nested": (
        "def forward(self, x): return self.head(self.maxpool(self.relu(self.bn1(self.conv1(x)))))\n",
        "conv1-bn1-relu-maxpool",
    ),
    "nested with a loose end": (
        "def forward(self, x): return self.head(self.fc(self.relu(self.bn1(self.conv1(x))).transpose(1, 3)))\n"
        "def head(self, x): return x.sum((1, 2))\n",
        "conv1-bn1-relu",
    ),
    "partly nested": (
        """
        def forward(self, images, scale=2.0, *, shift=1.0):
            y = self.bn1(self.conv1(images))
            y = self.relu(y)
            return self.head(y) * scale + shift
        """,
        "conv1-bn1-relu",
    ),
    "within blocks": (
        """
        def forward(this, x):
            "Its documentation."
            for _ in range(1):
                try:
                    if this.training:
                        x = this.conv1(x)
                        x = this.bn1(x)
                        x = this.relu(x)
                    else:
                        x = this.relu(this.bn1(this.conv1(x)))
                finally:
                    pass
            with torch.autograd.profiler.record_function("head"):
                return this.head(x)
        """,
        "conv1-bn1-relu",
    ),
}


class Stem(nn.Module):
    """A model whose method is rewritten, with a stage behind it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))

    def features(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.layer1(x)

    def forward(self, x):
        return self.features(x).mean((2, 3))


def stem_model():
    torch.manual_seed(0)
    return Stem()


def classes(model):
    return [type(m) for m in model.modules()]


def assert_equal(fused, stock, x, *tolerance):
    """Of one step from the state of `stock`, which is left as it is."""
    fused.load_state_dict(stock.state_dict())
    assert_same(observe(fused, x), observe(copy.deepcopy(stock), x), *tolerance)
