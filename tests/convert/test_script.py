"""TorchScript sees the stock classes, and leaves the model as it was."""

import copy
import io

import pytest
import torch
from nets import assert_near, assert_same, block, images, observe, pair, small_resnet
from stems import Stem, stem_model
from torch import nn

from resnet_fused.convert import swap

SCRIPTED = {
    "block": (block, 8),
    "model": (small_resnet, 3),
    "stem": (stem_model, 3),
    "stage in a model that is not ours": (lambda: nn.Sequential(nn.Sequential(block(), block(32)), nn.ReLU()), 8),
    "stem in a model that is not ours": (lambda: nn.Sequential(stem_model(), nn.ReLU()), 3),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripts_like_stock_and_is_left_as_it_was(name):
    make, channels = SCRIPTED[name]
    x = images(channels=channels, size=32)
    stock, fused = pair(make())
    before = [(id(m), type(m)) for m in fused.modules()]
    scripted = torch.jit.script(fused)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    want = observe(torch.jit.script(copy.deepcopy(stock)), x)
    for model in (scripted, torch.jit.load(buffer)):
        model.load_state_dict(stock.state_dict())
        assert_same(observe(model, x), want, 1e-5, 1e-5)
    assert [(id(m), type(m)) for m in fused.modules()] == before
    fused.load_state_dict(stock.state_dict())
    assert_near(observe(fused, x), observe(stock, x))


class Unscriptable(Stem):
    def forward(self, x):
        return self.features(x).mean(tuple({2, 3}))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_scripted_raises_stocks_error():
    stock, fused = pair(Unscriptable())
    assert swap.is_fused(fused)
    errors = []
    for model in (stock, fused):
        with pytest.raises(Exception) as raised:
            torch.jit.script(model)
        errors.append(raised.value)
    assert type(errors[1]) is type(errors[0])
    assert str(errors[1]).replace("Fused", "") == str(errors[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_traces_like_stock_however_often(name):
    """Nothing but stock's operations is recorded, so that a second trace, which checks the first, finds the same."""
    make, channels = SCRIPTED[name]
    x = images(channels=channels, size=32)
    stock, fused = pair(make().eval())
    for _ in range(2):
        torch.testing.assert_close(torch.jit.trace(fused, x)(x), stock(x))
        fused(x)
