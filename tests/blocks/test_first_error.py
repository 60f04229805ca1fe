"""Of two norms that stock refuses, fused blocks name the one that stock names."""

import copy

import pytest
import torch
from nets import block
from torch import nn

import resnet_fused
from resnet_fused.models import BasicBlock
from resnet_fused.plan import choose

WRONG = {
    "eps": lambda norm: setattr(norm, "eps", "small"),
    "no eps": lambda norm: setattr(norm, "eps", None),
    "momentum": lambda norm: setattr(norm, "momentum", "slow"),
    "width": lambda norm: setattr(norm, "weight", nn.Parameter(torch.ones(7))),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("first", "second"), [("width", "eps"), ("eps", "width"), ("momentum", "no eps")])
def test_it_is_the_one_that_stock_meets_first(first, second, training):
    stock = block(16, 16, kind=BasicBlock).train(training)
    fused, x, said = resnet_fused.fuse(copy.deepcopy(stock)), torch.randn(2, 16, 8, 8), []
    for model in (stock, fused):
        WRONG[first](model.bn1), WRONG[second](model.bn2)
        with pytest.raises((RuntimeError, TypeError)) as caught, choose.fusing_all():
            model(x)
        said.append(str(caught.value))
    assert said[0] == said[1]
