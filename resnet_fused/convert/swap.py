"""Swap a module's class for a subclass of it, and back: what blocks, stems and stages have in common.

A swapped module is its class, one of ours, and its state, plain data in the instance. Without the state the class does
nothing: everything in it then is what the stock class says. So whoever swaps or subclasses the class after us (FSDP2,
``parametrize``, a user) keeps a class that works, whether the module is fused or not; we take the state out and leave
their class alone.

A class of ours has the stock class as its second base and records it, its mixin as the first, the stock class's
``__module__``, and a ``forward`` with the globals, signature and source of the stock one. ``torch.jit.script``,
``torch.fx`` and ``inspect`` read these, so that they see stock without being told; ``__prepare_scriptable__`` would not
do, as what it returns replaces the child in a parent that is not ours.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize

STATE = "_resnet_fused"  # key of the state in the instance
_STOCK, _RECIPE = "_resnet_fused_stock", "_resnet_fused_recipe"
Recipe = tuple[Callable[..., type], tuple]


class Swapped:
    """Base of the mixins in front of a stock class."""

    _resnet_fused_stock: type
    _resnet_fused_class: type  # the class of ours itself, also seen from subclasses
    _resnet_fused_recipe: Recipe  # what makes the class again, in another process
    #: Methods of the stock class that ours stand in for: the function, its code and its defaults.
    _resnet_fused_read: dict[str, tuple]
    _resnet_fused_mixed = False  # whether somebody's subclass has bases between the stock class and its own

    def __init_subclass__(cls, **kwargs) -> None:
        """Ours are no subclasses that the stock class should know of, register, or ask for arguments."""
        if _STOCK in vars(cls):
            return
        if hasattr(cls, _STOCK):
            behind = cls.__mro__[cls.__mro__.index(Swapped) + 1 :]
            cls._resnet_fused_mixed = behind != cls._resnet_fused_stock.__mro__
        super().__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol):
        if not _is_ours(type(self)):
            return super().__reduce_ex__(protocol)
        swapped = type(self)
        object.__setattr__(self, "__class__", swapped._resnet_fused_stock)
        try:
            reduced = self.__reduce_ex__(protocol)  # whatever the stock class makes of itself
        finally:
            object.__setattr__(self, "__class__", swapped)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        return _rebuild, (swapped._resnet_fused_recipe, self.__dict__.get(STATE), function, arguments), *rest

    def _resnet_fused_replaced(self, name: str) -> bool:
        """Whether the stock method `name` is another than was read, for this module, or has other code by now."""
        if self._resnet_fused_mixed:
            return True
        function, code, defaults = self._resnet_fused_read[name]
        now = getattr(self._resnet_fused_stock, name, None)
        return now is not function or now.__code__ is not code or now.__defaults__ is not defaults


def _is_ours(cls: type) -> bool:
    return _STOCK in vars(cls)


def _rebuild(recipe: Recipe, state: object, function: Callable, arguments: tuple) -> object:
    module = function(*arguments)
    cls = recipe[0](*recipe[1])
    if type(module) is cls._resnet_fused_stock:
        object.__setattr__(module, "__class__", cls)
        if state is not None:
            module.__dict__[STATE] = state
    return module


def subclass(mixin: type, stock: type, recipe: Recipe, more: dict[str, object] | None = None) -> type:
    """The class with `mixin` in front of `stock`; one for each recipe, as long as anybody has it.

    `more`: other attributes; what has the name of a method of `stock` stands in for that.

    Raises:
        TypeError: the forward of `stock` is no function of one argument.
        Exception: whatever the metaclass of `stock` raises.
    """
    body = {**(more or {})}
    read = {name: method_of(stock, name) for name in body if hasattr(stock, name)}
    if "forward" in vars(mixin):
        read["forward"] = method_of(stock, "forward")
        body["forward"] = _disguised(vars(mixin)["forward"], read["forward"])
    read = {name: (function, function.__code__, function.__defaults__) for name, function in read.items()}
    for known in type.__subclasses__(stock):
        if vars(known).get(_RECIPE) == recipe and _are_same(known._resnet_fused_read, read):
            return known
    body |= {
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
        _STOCK: stock,
        _RECIPE: recipe,
        "_resnet_fused_read": read,
    }
    cls = types.new_class(f"Fused{stock.__name__}", (mixin, stock), exec_body=lambda namespace: namespace.update(body))
    cls._resnet_fused_class = cls
    return cls


def _are_same(read: dict[str, tuple], now: dict[str, tuple]) -> bool:
    """Whether two records of methods are of the same objects."""
    return read.keys() == now.keys() and all(a is b for name in now for a, b in zip(read[name], now[name], strict=True))


def _disguised(run: Callable, stock: types.FunctionType | None) -> types.FunctionType:
    """`run`, which takes one argument, with the name, signature, globals and source of `stock`.

    Raises:
        TypeError: `stock` takes others.
    """
    _resnet_fused_run = run  # under this name TorchScript sees it among the globals of `stock`

    def forward(self, x):
        return _resnet_fused_run(self, x)

    unusual = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    code = None if stock is None else stock.__code__
    if code is None or code.co_argcount != 2 or code.co_kwonlyargcount or code.co_flags & unusual:
        raise TypeError("its forward is no function of one argument")
    own = forward.__code__.replace(co_varnames=code.co_varnames[:2], co_posonlyargcount=code.co_posonlyargcount)
    method = types.FunctionType(own, stock.__globals__, stock.__name__, stock.__defaults__, forward.__closure__)
    return functools.update_wrapper(method, stock)


def method_of(cls: type, name: str) -> types.FunctionType | None:
    """The plain function that ``cls.name`` is; None if it is anything else."""
    value = inspect.getattr_static(cls, name, None)
    return value if type(value) is types.FunctionType else None


def is_fused(module: nn.Module, kind: type = Swapped) -> bool:
    """Whether `module` runs a class and a state of ours now, and of this kind."""
    return isinstance(module, kind) and STATE in module.__dict__


def is_subclassed(module: nn.Module, kind: type = Swapped) -> bool:
    """Whether the class of `module` is somebody's subclass of one of ours."""
    return isinstance(module, kind) and not _is_ours(type(module))


def stock_class(module: nn.Module) -> type:
    """The class of `module` without ours."""
    return type(module)._resnet_fused_stock if isinstance(module, Swapped) else type(module)


def put(module: nn.Module, make: Callable[[type], type], state: object) -> str:
    """Give `module` the class ``make(its stock class)`` and `state`. Returns why not, or an empty text."""
    remove(module)
    if parametrize.is_parametrized(module) and not isinstance(module, Swapped):
        return "it is parametrised itself"  # remove_parametrizations() works on the class that it finds
    try:
        cls = make(stock_class(module))
        if not isinstance(module, cls):
            if isinstance(module, Swapped):
                return "a subclass of another fused class"
            object.__setattr__(module, "__class__", cls)
    except Exception as error:  # a metaclass or a layout of somebody's own: what it raises means "cannot be swapped"
        return f"its class cannot be subclassed ({type(error).__name__}: {error})"
    module.__dict__[STATE] = state
    return ""


def remove(module: nn.Module) -> None:
    """Undo :func:`put`: the state goes, and the class too unless it is somebody's subclass of ours."""
    module.__dict__.pop(STATE, None)
    if _is_ours(type(module)):
        object.__setattr__(module, "__class__", type(module)._resnet_fused_stock)
