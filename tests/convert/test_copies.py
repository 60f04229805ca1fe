"""Copies and pickles are what the stock class makes of itself, fused again."""

import copy
import gc
import pickle
from typing import ClassVar

import pytest
import torch
from nets import BasicBlock, images
from stems import Stem, assert_equal

import resnet_fused
from resnet_fused.convert import swap
from resnet_fused.convert.fused_module import FusedState


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


def test_states_of_other_versions_say_what_to_do():
    """What they are made of is looked up by name, and what is set in them by its fields."""
    for name in ("ChainCall", "Program"):
        data = f"cresnet_fused.convert.instructions\n{name}\n.".encode()
        with pytest.raises(pickle.UnpicklingError, match=r"fused by another version .* unfuse\(model\)"):
            pickle.loads(data)
    state = FusedState.__new__(FusedState)
    with pytest.raises(pickle.UnpicklingError, match=r"fused by another version .* unfuse\(model\)"):
        state.__setstate__({"program": None, "whole": None})
