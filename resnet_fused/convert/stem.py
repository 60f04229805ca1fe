"""The stem, convolution-norm-ReLU called one after another in a model's own method.

A model's forward is too free to be traced, so its methods are rewritten instead, in a subclass of the model's class:
``x = self.conv1(x); x = self.bn1(x); x = self.relu(x); x = self.maxpool(x)`` (or the same nested) becomes ::

    if self._resnet_fused_runs(stem, x):
        x = self._resnet_fused_run(stem, x)
    else:
        ...  # the statements as they were

so that whatever is unusual, an error, a hook, ``torch.fx``, runs in stock's code, in stock's order.

Rewriting needs source. Without it there are the machine code of Python, which is another in each version of it, and
children that run more than themselves when they are called, which nobody but a reader of the method can call safe.
So source is taken, and proven: see :mod:`.source`. A method whose source is not at hand stays stock.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..blocks import norms
from ..blocks.layers import pool_geometry, why_not_conv
from ..blocks.runtime import run_as_stock
from ..blocks.shape import Shape, remembered, residual_shape
from ..blocks.site import Site, find, module_obstacle, sites_in, value_obstacle
from . import as_stock, source, swap
from .forced import is_stock_forced
from .rewrite import Rewriter, Stem
from .swap import STATE


@dataclasses.dataclass
class StemState:
    """What a model with a fused stem carries; plain data."""

    stems: tuple[Stem, ...]
    backend: str
    precision: str = "default"


def _child(model: nn.Module, name: str) -> nn.Module | None:
    """The child that ``self.name`` is without running anybody's code; None where that is not certain."""
    kind = type(model)
    if kind.__getattribute__ is not object.__getattribute__ or kind.__getattr__ is not nn.Module.__getattr__:
        return None
    return None if name in model.__dict__ or hasattr(kind, name) else model._modules.get(name)


@remembered
def _shapes(names: tuple[str, ...], sequential: str, pool: str) -> tuple[Shape]:
    """The program of convolutions, norms and ReLUs in a row, perhaps some in one Sequential."""
    steps = zip(names[0::3], names[1::3], strict=True)
    bypassed = [(name, "ReLU") for name in names[2::3]] + [(sequential, "Sequential")] * bool(sequential)
    return (residual_shape(steps, pool=pool, bypassed=tuple(bypassed)),)


def stem_site(
    model: nn.Module, stem: Stem, backend: str, pools: bool = False, precision: str = "default"
) -> Site | None:
    """The program of a stem, a Sequential's members laid out in a row; None if not every third of them is a ReLU.

    `pools`: with its pool.
    """
    if any(_child(model, name) is None for name in stem if name):
        return None
    first, sequential, names = stem[0], "", [stem[0]]
    if type(model._modules[first]) is nn.Sequential:
        sequential, names = first, [f"{first}.{name}" for name in model._modules[first]._modules]
    names += stem[1:3]
    if len(names) % 3 or any(type(find(model, name)) is not nn.ReLU for name in names[2::3]):
        return None
    shapes = _shapes(tuple(names), sequential, stem[3] if pools else "")
    sites = sites_in(model, shapes, backend, precision=precision)
    return None if sites is None else sites[0]


class FusedStem(swap.Swapped):
    """Mixin in front of a model's class whose methods run stems; its names hide none of the model's."""

    def _resnet_fused_runs(self, stem: Stem, x: object) -> bool:
        """Whether :meth:`_resnet_fused_run` may stand in for the calls of `stem`."""
        state: StemState | None = self.__dict__.get(STATE)
        if state is None or stem not in state.stems or is_stock_forced() or torch.jit.is_tracing():
            return False
        if as_stock.is_within() or as_stock.is_known(self, x, stem):
            return False
        site = stem_site(self, stem, state.backend, precision=state.precision)
        return site is not None and not module_obstacle(site) and not value_obstacle(x, site)

    def _resnet_fused_run(self, stem: Stem, x):
        """``pool(act(norm(conv(x))))``, fused; the pool may be any module, called if it cannot be fused."""
        pool, before = self._modules[stem[3]] if stem[3] else None, as_stock.so_far()
        pools = pool is not None and pool_geometry(pool) is not None
        state: StemState = self.__dict__[STATE]
        site = stem_site(self, stem, state.backend, pools, state.precision)
        out = run_as_stock(site, x)
        as_stock.note(self, [site], x, before, stem, alone=True)
        return out if pool is None or pools else pool(out)


class _Rewritten:
    """A rewritten method in its class, as long as the stock class has the one that was read; then what that has.

    An attribute, not a function around both: the arguments are for the other to judge, and nobody sees a frame more.
    """

    def __init__(self, name: str, function: types.FunctionType) -> None:
        self.name, self.function = name, function

    @property
    def key(self) -> str:
        """Where the function itself is in the class."""
        return f"_resnet_fused_method_{self.name}"

    def __get__(self, module: FusedStem | None, cls: type):
        if module is None:
            return self.function
        if module._resnet_fused_replaced(self.name):
            return getattr(super(swap.Swapped, module), self.name)
        return getattr(module, self.key)


def _rewritten(
    cls: type, names: Iterable[str], accept: Callable[[Stem], bool]
) -> dict[str, tuple[types.FunctionType, list[Stem]]]:
    """The methods that read at least three of `names`, as the class knows them, with their stems rewritten, and these.

    But for those where there are none, or whose source is not proven.
    """
    names, found = set(names), {}
    for name in dict.fromkeys(name for base in cls.__mro__ for name in vars(base)):
        method = None if name.startswith("__") else swap.method_of(cls, name)
        if method is None or len(names.intersection(method.__code__.co_names)) < 3:
            continue
        definition = source.find(method)
        rewriter = definition and Rewriter(definition, method.__code__, accept)
        function = source.recompile(method, definition) if rewriter and rewriter.rewrite() else None
        if function is not None:
            found[name] = function, rewriter.found
    return found


def _stem_class(stock: type, stems: tuple[Stem, ...]) -> type:
    """The subclass of `stock` whose methods run `stems`."""
    methods = _rewritten(stock, {child for stem in stems for child in stem}, stems.__contains__)
    body = {name: _Rewritten(name, function) for name, (function, _) in methods.items()}
    body |= {entry.key: entry.function for entry in [*body.values()]}
    return swap.subclass(FusedStem, stock, (_stem_class, (stock, stems)), body)


def fuse_stem(model: nn.Module, backend: str, precision: str | None = None) -> str:
    """Fuse the stem of `model`, if it has one. Returns why not, or an empty text."""

    def accept(stem: Stem) -> bool:
        if stem[3] and type(_child(model, stem[3])) is not nn.MaxPool2d:
            return False
        site = stem_site(model, stem, backend)
        return site is not None and not any(
            why_not_conv(conv) or norms.why_not(norm) or norms.activation_of(norm) is not None
            for conv, norm in zip(site.convolutions, site.norms, strict=True)
        )

    if swap.is_subclassed(model, FusedStem):  # by somebody: the methods below are rewritten already
        cls = type(model)._resnet_fused_class
        stems = tuple(stem for stem in cls._resnet_fused_recipe[1][1] if accept(stem))
    else:
        cls = None
        methods = _rewritten(swap.stock_class(model), model._modules, accept)
        stems = tuple(dict.fromkeys(stem for _, found in methods.values() for stem in found))
    if not stems:
        return "no conv-norm-ReLU calls in a row in its methods"
    word = precision or getattr(model.__dict__.get(STATE), "precision", "default")
    return swap.put(model, lambda stock: cls or _stem_class(stock, stems), StemState(stems, backend, word))
