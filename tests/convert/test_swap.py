"""Classes that others swap or subclass, before and after ours: theirs stay, and ours go whole."""

import copy
import pickle

import pytest
import torch
from nets import BasicBlock, block, images, pair
from stems import Stem, assert_equal, classes, stem_model
from torch import nn
from torch.nn.utils import parametrize

import resnet_fused
from resnet_fused.convert import swap


def test_a_users_subclass_stays_and_ours_goes_out_of_its_way(kind):
    stock, fused, find, x = kind
    mine = type("Mine", (type(find(fused)),), {"extra": 3})
    find(fused).__class__ = mine
    rows = resnet_fused.report(fused)
    for other in (fused, copy.deepcopy(fused), copy.copy(fused)):
        assert type(find(other)) is mine and swap.is_fused(find(other))
        assert_equal(other, stock, x)
    resnet_fused.unfuse(fused)
    assert type(find(fused)) is mine and not any("_resnet_fused" in vars(m) for m in fused.modules())
    assert not resnet_fused.report(fused).fused
    assert_equal(fused, stock, x, 0, 0)
    resnet_fused.fuse(fused)
    assert type(find(fused)) is mine and swap.is_fused(find(fused)) and resnet_fused.report(fused) == rows
    find(fused).__class__ = mine.__bases__[0]
    assert classes(resnet_fused.unfuse(fused)) == classes(stock)


def test_a_class_taken_away_leaves_nothing(kind):
    stock, fused, find, x = kind
    find(fused).__class__ = type(find(stock))
    assert not swap.is_fused(find(fused))
    assert classes(resnet_fused.unfuse(fused)) == classes(stock)
    assert not any("_resnet_fused" in vars(m) for m in fused.modules())
    assert_equal(fused, stock, x, 0, 0)


def test_an_instance_without_state_is_stock_and_can_be_fused(kind):
    stock, fused, find, x = kind
    del find(fused).__dict__["_resnet_fused"]
    other = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    assert not swap.is_fused(find(other))
    assert_equal(other, stock, x)
    resnet_fused.fuse(other)
    assert swap.is_fused(find(other))
    assert classes(resnet_fused.unfuse(other)) == classes(stock)


@pytest.mark.parametrize("kind", ["block", "stem"], indirect=True)  # stock runs what it finds in a Sequential
def test_parametrize_on_a_fused_module(kind):
    stock, fused, find, x = kind
    for model in (stock, fused):
        find(model).register_parameter("extra", nn.Parameter(torch.ones(2)))
        parametrize.register_parametrization(find(model), "extra", nn.Softplus())
    ours = type(find(fused)).__bases__[0]
    assert_equal(fused, stock, x)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(fused)
    resnet_fused.unfuse(fused)
    assert torch.equal(find(fused).extra, find(stock).extra)
    assert_equal(fused, stock, x, 0, 0)
    resnet_fused.fuse(fused)
    assert swap.is_fused(find(fused))
    for model in (stock, fused):
        parametrize.remove_parametrizations(find(model), "extra")
    assert type(find(fused)) is ours
    assert_equal(fused, stock, x)
    assert classes(resnet_fused.unfuse(fused)) == classes(stock)


def test_a_module_parametrised_before_stays_stock():
    stock = block(kind=BasicBlock)
    stock.register_parameter("extra", nn.Parameter(torch.ones(2)))
    parametrize.register_parametrization(stock, "extra", nn.Softplus())
    with pytest.warns(UserWarning, match="it is parametrised itself"):
        resnet_fused.fuse(stock)
    parametrize.remove_parametrizations(stock, "extra")
    assert swap.is_fused(resnet_fused.fuse(stock))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("order", ["fuse first", "shard first"])
def test_fully_shard(tmp_path, order):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    stock, fused = stem_model(), stem_model()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        mesh = init_device_mesh("cpu", (1,))
        if order == "fuse first":
            resnet_fused.fuse(fused)
        for module in (*fused.layer1, fused.layer1, fused):
            fully_shard(module, mesh=mesh)
        sharded = classes(fused)
        for _ in range(2):
            resnet_fused.fuse(fused)
            assert swap.is_fused(fused) and swap.is_fused(fused.layer1[0]) and isinstance(fused, FSDPModule)
            assert not resnet_fused.report(fused).left  # outside of a call its parameters are sharded
            loss = [m(images(channels=3)).square().sum() for m in (fused, stock)]
            for each in loss:
                each.backward()
            torch.testing.assert_close(*loss)
            for p, q in zip(fused.parameters(), stock.parameters(), strict=True):
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=1e-3)
            resnet_fused.unfuse(fused)
            assert classes(fused) == sharded and not any(swap.is_fused(m) for m in fused.modules())
            assert torch.equal(fused(images(channels=3)), stock(images(channels=3)))
    finally:
        torch.distributed.destroy_process_group()


def test_a_subclass_with_another_base_behind_ours_runs_that():
    class Louder(BasicBlock):
        def forward(self, x):
            return super().forward(x) * 2

    stock, fused = pair(block(kind=BasicBlock))
    fused.__class__ = type("Mine", (type(fused), Louder), {})
    assert torch.equal(fused(images()), stock(images()) * 2)
    assert "its forward, or what it reads" in resnet_fused.report(fused).left[0].reason


def test_a_subclass_that_changes_what_the_forward_reads():
    class Scaled(BasicBlock):
        factor = 2.0

        def forward(self, x):
            return torch.relu(self.bn1(self.conv1(x))) * self.factor

    stock, fused = pair(Scaled(8, 8))
    resnet_fused.unfuse(fused)
    fused = resnet_fused.fuse(fused)
    fused.__class__ = type("Mine", (type(fused),), {"factor": 3.0})
    resnet_fused.unfuse(fused)
    stock.factor = 3.0
    assert_equal(resnet_fused.fuse(fused), stock, images())
    assert swap.is_fused(fused)


@pytest.mark.filterwarnings("ignore:fuse. nothing to fuse")
def test_a_forward_replaced_on_the_stock_class_wins():
    class Own(BasicBlock):
        pass

    stock, fused = pair(Own(8, 8))
    Own.forward = lambda self, x: self.conv1(x) * 2
    assert torch.equal(fused(images()), stock(images()))
    assert "its forward, or what it reads" in resnet_fused.report(fused).left[0].reason
    resnet_fused.fuse(resnet_fused.unfuse(fused))
    assert type(fused) is Own


def test_code_put_in_again_is_read_again():
    class Own(BasicBlock):
        def forward(self, x):
            return torch.relu(self.bn1(self.conv1(x)))

    stock, fused = pair(Own(8, 8))
    Own.forward.__code__ = Own.forward.__code__.replace()  # as what reloads modules while they are in use does
    assert not resnet_fused.report(fused).fused
    assert resnet_fused.report(resnet_fused.fuse(fused)).fused
    assert_equal(fused, stock, images())


def test_a_method_taken_from_the_stock_class():
    class Own(Stem):
        def features(self, x):
            return self.layer1(self.relu(self.bn1(self.conv1(x))))

    stock, fused = pair(Own())
    del Own.features  # the base has another
    assert "was given another features" in resnet_fused.report(fused).left[0].reason
    assert_equal(fused, stock, images(channels=3))
    features, Stem.features = Stem.features, None
    try:
        resnet_fused.report(fused)
        del Stem.features
        for model in (stock, fused):
            with pytest.raises(AttributeError, match="object has no attribute 'features'"):
                model(images(channels=3))
        resnet_fused.report(fused)
    finally:
        Stem.features = features


def test_what_torch_asks_of_a_class_is_answered_as_by_the_stock_one(kind):
    stock, fused, find, _ = kind
    assert type(find(fused)).__module__ == type(find(stock)).__module__
    assert type(find(fused)).__name__ == f"Fused{type(find(stock)).__name__}"
    assert torch.fx.symbolic_trace(fused.eval()).code == torch.fx.symbolic_trace(stock.eval()).code
