"""Classes that others swap, subclass, copy or pickle, before and after ours: theirs stay, and ours go whole."""

import copy
import gc
import io
import pickle
from typing import ClassVar

import pytest
import torch
from nets import BasicBlock, assert_near, assert_same, block, images, observe, pair, small_resnet
from torch import nn
from torch.nn.utils import parametrize

import resnet_fused
from resnet_fused.convert import stage, stem, swap
from resnet_fused.convert.fused_module import FusedModule


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


#: What was swapped, how to find it in a model, and an input of that model.
KINDS = {
    "block": (lambda: block(kind=BasicBlock), lambda m: m, FusedModule, images()),
    "stem": (stem_model, lambda m: m, stem.FusedStem, images(channels=3)),
    "stage": (stem_model, lambda m: m.layer1, stage.FusedStage, images(channels=3)),
}


@pytest.fixture(params=KINDS)
def kind(request):
    make, find, mixin, x = KINDS[request.param]
    stock, fused = pair(make())
    assert isinstance(find(fused), mixin) and swap.is_fused(find(fused))
    return stock, fused, find, x


def classes(model):
    return [type(m) for m in model.modules()]


def assert_equal(fused, stock, x, *tolerance):
    """Of one step from the state of `stock`, which is left as it is."""
    fused.load_state_dict(stock.state_dict())
    assert_same(observe(fused, x), observe(copy.deepcopy(stock), x), *tolerance)


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


def plain_new(cls, *args):
    return cls(*args)


class Reduces(BasicBlock):
    def __reduce__(self):
        return plain_new, (Reduces, 8, 8), self.__dict__


class ReducesEx(BasicBlock):
    def __reduce_ex__(self, protocol):
        return plain_new, (type(self), 8, 8), self.__getstate__()


class Rebuilt(BasicBlock):
    """All that a copy keeps is what its constructor makes."""

    def __reduce__(self):
        torch.manual_seed(0)
        return plain_new, (type(self), 8, 8)


class GetState(BasicBlock):
    def __getstate__(self):
        return {**self.__dict__, "seen": True}

    def __setstate__(self, state):
        assert state.pop("seen")
        super().__setstate__(state)


class DeepCopies(BasicBlock):
    def __deepcopy__(self, memo):
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


class Slots(BasicBlock):
    __slots__ = ("held",)

    def __init__(self, *args):
        self.held = 1
        super().__init__(*args)


class Meta(type):
    def __call__(cls, *args, **kwargs):
        instance = super().__call__(*args, **kwargs)
        instance.called = True
        return instance


class WithMeta(BasicBlock, metaclass=Meta):
    pass


class Registers(BasicBlock):
    known: ClassVar = []

    def __init_subclass__(cls, *, name, **kwargs):
        super().__init_subclass__(**kwargs)
        Registers.known.append(name)


class Strict(BasicBlock):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("the class is what it is")
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    "kind", [Reduces, ReducesEx, Rebuilt, GetState, DeepCopies, Slots, WithMeta, Registers, Strict]
)
def test_classes_with_ways_of_their_own(kind):
    torch.manual_seed(0)
    stock = kind(8, 8)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    assert swap.is_fused(fused)
    x = images()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        if kind is Slots and protocol < 2:
            continue  # neither can stock
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused, protocol))):
            assert type(other) is type(fused) and swap.is_fused(other)
            assert_equal(other, stock, x)
            assert type(resnet_fused.unfuse(other)) is kind
            assert vars(other).keys() == vars(copy.deepcopy(stock)).keys()
    if kind is Registers:
        type("Mine", (type(fused),), {}, name="mine")
        assert Registers.known == ["mine"]


def test_a_class_that_cannot_be_subclassed_stays_stock():
    class Final(type):
        def __new__(mcs, name, bases, body):
            if name != "Last":
                raise TypeError("Last is final")
            return super().__new__(mcs, name, bases, body)

    class Last(BasicBlock, metaclass=Final):
        pass

    with pytest.warns(UserWarning, match=r"cannot be subclassed \(TypeError: Last is final\)"):
        assert type(resnet_fused.fuse(Last(8, 8))) is Last


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


def test_a_class_lives_as_long_as_somebody_has_it():
    class Own(BasicBlock):
        pass

    model = resnet_fused.fuse(Own(8, 8))
    ours = type(model)
    assert type(resnet_fused.fuse(Own(8, 8))) is ours
    del model, ours
    gc.collect()
    assert not Own.__subclasses__()


class Once(Stem):
    """For one test alone: what shards a class keeps it."""


def test_a_pickle_makes_the_class_again():
    model = resnet_fused.fuse(Once())
    before, data = repr(model), pickle.dumps(model)
    del model
    gc.collect()
    assert not Once.__subclasses__()
    assert repr(pickle.loads(data)) == before
    assert len(resnet_fused.report(pickle.loads(data)).fused) == 3


def test_what_torch_asks_of_a_class_is_answered_as_by_the_stock_one(kind):
    stock, fused, find, _ = kind
    assert type(find(fused)).__module__ == type(find(stock)).__module__
    assert type(find(fused)).__name__ == f"Fused{type(find(stock)).__name__}"
    assert torch.fx.symbolic_trace(fused.eval()).code == torch.fx.symbolic_trace(stock.eval()).code


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
