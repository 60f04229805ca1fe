"""Whether the modules of a site are what they were when they were last read, object by object: a short way to the
answer that :mod:`.site`, :mod:`.layers` and :mod:`.norms` would find again.

What a module does is decided by its class and its ``__dict__``. While every attribute is the very object it was, no
hook has been registered, the tensors in ``_parameters`` and ``_buffers`` have the same ids, strides, dtype, device
and shape, and the classes have the methods and the number of attributes that they had, everything read of them would
be read again. Whatever differs, by an equal object too, is read anew. Only PyTorch's own classes, and drop paths, with
settings that cannot change in place are taken; all others are read at every call.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable

import torch
from torch import nn
from torch._C._dynamo.guards import TensorGuards, dict_version

from . import proven

_CLASSES = frozenset(
    (
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Sequential, nn.Dropout,
        nn.Dropout2d, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish, nn.ReLU6,
    )
)  # fmt: skip
_OWN, _INNER = operator.attrgetter("__dict__"), ("_parameters", "_buffers")
_HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FACTS = operator.attrgetter("dtype", "device", "shape", "requires_grad", "__class__")
_ASKED = torch.Tensor.stride, torch.Tensor.is_inference, torch.Tensor.is_neg
_PLAIN = (torch.Tensor, nn.Parameter)
is_wrapper = torch._C._functorch.is_functorch_wrapped_tensor  # of a transform, which may have ended
#: CPython gives a dictionary another version, which no other has, at every write; from 3.12 on PyTorch counts, in
#: the dictionaries that it is asked for.
_HAS_VERSIONS = sys.implementation.name == "cpython" and sys.version_info < (3, 12)
_FIXED = (bool, int, float, str, type(None))


def _is_fixed(value: object) -> bool:
    """Whether a setting cannot be changed but by another object."""
    return type(value) in _FIXED or (type(value) is tuple and all(type(item) in _FIXED for item in value))


class Same:
    """Modules and the dictionaries that they consist of, whose entries are to be the very objects they were.

    `inner`: by their names, those of the dictionaries within a module that are compared too.
    """

    def __init__(self, modules: list[nn.Module], inner: tuple[str, ...] = ()) -> None:
        self.modules, self.classes = modules, [*map(type, modules)]
        self.owns = [*map(_OWN, modules)]
        self.inner = [own[name] for own in self.owns for name in inner]
        self.dicts = [*self.owns, *self.inner]
        self.sizes, self.keys = [*map(len, self.dicts)], [*itertools.chain.from_iterable(self.dicts)]
        self.values = [*itertools.chain.from_iterable(map(dict.values, self.owns))]
        self.ids = self._ids()
        self.versions: list[int] | None = None  # of the dictionaries, when they were last compared

    def _ids(self) -> list[int]:
        """Of the tensors, which are not kept: one in the memory of another that has gone is read as that was."""
        return [*map(id, itertools.chain.from_iterable(map(dict.values, self.inner)))]

    def holds(self) -> bool:
        """Compare what there is now; every loop is C's. Of dictionaries that nobody wrote to only the versions."""
        types, owns = map(type, self.modules), map(_OWN, self.modules)
        if not (all(map(operator.is_, types, self.classes)) and all(map(operator.is_, owns, self.owns))):
            return False
        versions = [*map(dict_version, self.dicts)] if _HAS_VERSIONS else None
        if versions is not None and versions == self.versions:
            return True
        if not self._holds_object_by_object():
            return False
        self.versions = versions
        return True

    def _holds_object_by_object(self) -> bool:
        return (
            [*map(len, self.dicts)] == self.sizes
            and all(map(operator.is_, itertools.chain.from_iterable(map(dict.values, self.owns)), self.values))
            and self._ids() == self.ids
            and all(map(operator.is_, itertools.chain.from_iterable(self.dicts), self.keys))
        )


class Methods:
    """The methods that a call of a class goes through, and how many attributes its bases have."""

    def __init__(self, cls: type) -> None:
        known = proven.known(cls)
        self.cls, self.bases = cls, [base.__dict__ for base in cls.__mro__]
        self.get, self.methods = operator.attrgetter(*dict(known.methods)), [method for _, method in known.methods]
        self.counts, self.called = [*map(len, self.bases)], known.called

    def holds(self) -> bool:
        for place, name, function in self.called:
            if place.get(name) is not function:
                return False
        return all(map(operator.is_, self.get(self.cls), self.methods)) and [*map(len, self.bases)] == self.counts


def hooks_of(owns: Iterable[dict]) -> list[dict]:
    """Where hooks are kept, of modules that have these dictionaries."""
    return [hooks for own in owns for hooks in _HOOKS(own)]


class Forms(dict):
    """What is kept by the forms of calls: image sizes, dtypes. When there are many, they are collected anew."""

    LIMIT = 64

    def __setitem__(self, form: object, value: object) -> None:
        if len(self) >= self.LIMIT:
            self.clear()
        super().__setitem__(form, value)


class Unchanged:
    """The modules that a site runs itself and those that it passes over, as they are now."""

    #: What was read of the settings of the first, for whoever reads them again while :meth:`settings_hold`.
    read: object = None

    def __init__(self, modules: Iterable[nn.Module], bypassed: Iterable[nn.Module]) -> None:
        self.ready = Forms()  # how a call runs
        self.sizes = Forms()  # of the program's values, by the shape of what enters
        self._run = Same(list(modules), _INNER)
        self._bypassed = Same(list(bypassed))
        owns = [*self._run.owns, *self._bypassed.owns]
        self.classes = [*map(Methods, {*self._run.classes, *self._bypassed.classes})]
        self._hooks = hooks_of(owns)
        self._facts, self._guards = self._read_facts(), None

    def _tensors(self) -> list[torch.Tensor]:
        return [t for inner in self._run.inner for t in inner.values() if t is not None]

    def _read_facts(self) -> list[tuple]:
        tensors = self._tensors()
        return [*map(_FACTS, tensors), *itertools.chain.from_iterable(map(ask, tensors) for ask in _ASKED)]

    def facts_hold(self) -> bool:
        """Whether the tensors are what they were.

        PyTorch's guards compare the same and more, such as whether autocast is on, in a fifth of the time: where they
        differ from the call before, the facts decide.
        """
        tensors = self._tensors()
        if self._guards is not None and self._guards.check(*tensors):
            return True
        if self._read_facts() != self._facts:
            return False
        if tensors:
            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return True

    def is_complete(self) -> bool:
        """Whether nothing else decides how these modules are read."""
        for same in (self._run, self._bypassed):
            for own, cls in zip(same.owns, same.classes, strict=True):
                settings = [value for name, value in own.items() if not name.startswith("_")]
                hides = any(name in own or hasattr(cls, name) for inner in _INNER for name in own[inner])
                named = proven.own_kind(cls)
                known = cls in _CLASSES or named in proven.DROP_PATHS or named in proven.DENSE_LAYERS
                if not known or hides or not all(map(_is_fixed, settings)):
                    return False
        return True

    def is_plain(self) -> bool:
        """Whether all tensors are PyTorch's own: others (fake ones, of `explain`) stand there for a while only."""
        return all(type(t) in _PLAIN and not is_wrapper(t) for t in self._tensors())

    def memory(self) -> tuple:
        """What the memory of the tensors is, which can be exchanged under them."""
        return tuple(map(torch.Tensor.data_ptr, self._tensors()))

    def slots(self, tensors: Iterable[torch.Tensor]) -> list[tuple[dict, str]] | None:
        """Where each of `tensors` is to be looked up; None where one is not of these modules."""
        found = {id(t): (inner, name) for inner in self._run.inner for name, t in inner.items()}
        slots = [found.get(id(t)) for t in tensors]
        return None if None in slots else slots

    def settings_hold(self) -> bool:
        """Whether the convolutions, norms and pool have the settings that they had."""
        return self._run.holds()

    def holds(self) -> bool:
        """Whether everything is as it was."""
        return (
            not any(self._hooks)
            and self._run.holds()
            and self._bypassed.holds()
            and all(map(Methods.holds, self.classes))
            and self.facts_hold()
        )
