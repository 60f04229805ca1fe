"""What a forward reads outside of its block, globals of its module and functions of PyTorch, bound anew after fuse."""

import copy
import pickle

import pytest
import torch
from nets import images, observe
from torch import nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.convert import swap
from resnet_fused.plan import choose

SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import relu

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

class ByName(Block):
    def forward(self, x):
        return relu(torch.add(self.bn(self.conv(x)), x))

class ByNamespace(Block):
    def forward(self, x):
        return F.avg_pool2d(torch.cat([F.relu(self.bn(self.conv(x)) + x), x], 1), 2)

class ByMethods(Block):
    def forward(self, x):
        return self.bn(self.conv(x)).add_(x).relu()
"""


class Tripled:
    """A namespace with other functions."""

    relu = staticmethod(lambda x: 3 * x)
    avg_pool2d = staticmethod(F.avg_pool2d)


@pytest.fixture
def names():
    """The namespace of a notebook."""
    found = {"__name__": "notebook"}
    exec(SOURCE, found)
    return found


@pytest.fixture(autouse=True)
def _small_ones_too():
    with choose.fusing_all():
        yield


def _pair(names, cls):
    torch.manual_seed(0)
    stock = names[cls]().double()
    return stock, resnet_fused.fuse(copy.deepcopy(stock))


def _assert_alike(stock, fused):
    x = images().double()
    got, want = observe(fused, x), observe(stock, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls, name, value", [("ByName", "relu", Tripled.relu), ("ByNamespace", "F", Tripled)])
def test_a_global_bound_anew_is_what_runs(names, cls, name, value):
    stock, fused = _pair(names, cls)
    assert resnet_fused.report(fused).fused
    _assert_alike(stock, fused)
    before, names[name] = names[name], value
    assert not resnet_fused.report(fused).fused
    _assert_alike(stock, fused)
    names[name] = before
    assert resnet_fused.report(fused).fused


def test_a_global_of_another_known_function_is_another(names):
    """Bound to what a traceable forward may use as well, and a second model fused with that."""
    stock, fused = _pair(names, "ByName")
    names["relu"] = torch.relu
    _pair(names, "ByName")
    assert not resnet_fused.report(fused).fused
    _assert_alike(stock, fused)


def test_a_deleted_global_raises_as_in_stock(names):
    _, fused = _pair(names, "ByName")
    del names["relu"]
    assert not resnet_fused.report(fused).fused
    with pytest.raises(NameError):
        fused(images().double())


@pytest.mark.parametrize("place, name", [(torch, "cat"), (F, "avg_pool2d"), (F, "relu")])
def test_a_function_exchanged_in_torch_is_what_runs(names, monkeypatch, place, name):
    stock, fused = _pair(names, "ByNamespace")
    function = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **kwargs: 2 * function(*args, **kwargs))
    _assert_alike(stock, fused)
    assert not swap.is_fused(_pair(names, "ByNamespace")[1]), "traced with another's function in it"


@pytest.mark.parametrize("cls, name", [("ByNamespace", "__add__"), ("ByMethods", "add_"), ("ByMethods", "relu")])
def test_a_method_exchanged_in_tensor_is_what_runs(names, monkeypatch, cls, name):
    stock, fused = _pair(names, cls)
    assert resnet_fused.report(fused).fused
    method = getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda x, *args: method(x * 2, *args))
    with torch.no_grad():
        x = images().double()
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-9, atol=1e-9)


def test_a_compiled_block_follows_its_globals(names):
    _, fused = _pair(names, "ByNamespace")
    compiled, x = torch.compile(fused.eval(), backend="eager", fullgraph=True), images().double()
    before = compiled(x)
    names["F"] = Tripled
    torch.testing.assert_close(compiled(x), names["ByNamespace"].forward(fused, x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(compiled(x), before)


def test_what_is_read_outside_is_plain_data():
    model = resnet_fused.fuse(resnet_fused.models.resnet18(num_classes=2))
    again = pickle.loads(pickle.dumps(model))
    assert again.layer1[0]._resnet_fused.outside == model.layer1[0]._resnet_fused.outside
    assert isinstance(again.layer1[0].bn1, nn.BatchNorm2d)
    assert resnet_fused.report(again).fused
