"""`explain` of models whose results, calls or tensors are not the usual ones."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import resnet_fused
from resnet_fused.models import BasicBlock
from resnet_fused.plan import devices
from resnet_fused.traffic.calls import calls


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = BasicBlock(16, 16)

    def forward(self, x):
        return self.block(x)


class Features(Net):
    def forward(self, x):
        y = self.block(x)
        return {"out": y, "classes": y.mean((2, 3)).argmax(1), "more": [y.mean(), None]}


class Named(Net):
    def forward(self, x):
        return self.block(x=x)


class Centred(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.ones(1, 16, 1, 1)

    def forward(self, x):
        return self.block(x - self.mean)


def pruned():
    net = Net()
    prune.l1_unstructured(net.block.conv1, "weight", 0.5)
    return net


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [Features, Named, Centred, pruned])
def test_it_is_explained(build, dtype, training):
    found = resnet_fused.explain(build(), (2, 16, 56, 56), dtype=dtype, training=training, device="h100")
    assert found.model.shape == (2, 16, 56, 56)
    assert found.model.stock.flops >= 2 * 2 * 9 * 16 * 16 * 2 * 54 * 54  # both convolutions without their padding
    if build is pruned:
        assert any("hooks" in row for row in found.left) and found.model.fused.launches == found.model.stock.launches
    else:
        assert [block.name for block in found.blocks] == ["block"] and "norm" in found.blocks[0].plan


@pytest.mark.parametrize("training", [True, False])
def test_gradients_go_to_all_results(training):
    counts = [
        resnet_fused.explain(build(), (2, 16, 56, 56), training=training).model.stock for build in (Net, Features)
    ]
    assert counts[1].flops == counts[0].flops and counts[1].launches > counts[0].launches


@pytest.mark.parametrize("training", [True, False])
def test_a_model_without_memory_is_planned_for_like_any(training):
    found = [
        resnet_fused.explain(Net().to(place), (2, 16, 56, 56), training=training, device="h100").blocks[0]
        for place in ("cpu", "meta")
    ]
    assert found[0].plan == found[1].plan and found[0].fused.operations == found[1].fused.operations


def test_what_is_left_is_left_of_the_model_that_is_counted():
    """In one dtype, as asked for: of `model` itself parameters of different dtypes would be."""
    net = Net()
    net.block.conv1.half()
    found = resnet_fused.explain(net, (2, 16, 56, 56), training=False, device="h100")
    assert found.left == () and found.model.fused.launches < found.model.stock.launches


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [Features, Named, Centred, pruned, lambda: Net().to("meta")])
def test_its_calls_are_found(build, training):
    x = torch.empty(2, 16, 56, 56, device="meta")
    found = calls(build(), x, training, devices.find("h100"), torch.bfloat16)
    if build is pruned:
        assert not found
    else:
        assert found == calls(Net(), x, training, devices.find("h100"), torch.bfloat16)
