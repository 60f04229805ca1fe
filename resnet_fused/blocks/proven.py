"""Whether a module still is what its class was when this package was imported: the condition for not calling it.

A fused block stands in for the convolutions, norms and activations it owns. Python lets anybody give one of them other
code: a method set on the instance, a subclass (parametrisations make one), a method replaced on PyTorch's own class, a
function of ``torch.nn.functional`` exchanged. So a module is bypassed only while all of this holds:

* its class is one that is known here, or a subclass that overrides nothing of what a call reads or runs;
* no attribute of the instance hides a method;
* the class's methods, and the functions they call, are the very objects they were at import (of classes in packages
  that are not imported here: those that the class's own source defines).
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

#: Methods through which a call of a module goes, beside its forward.
CALL = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")

#: What a subclass may define without changing what a call does.
_HARMLESS = frozenset(
    "__init__ __doc__ __module__ __qualname__ __dict__ __weakref__ __annotations__ __repr__ extra_repr __str__ __dir__ "
    "reset_parameters reset_running_stats __constants__ __static_attributes__ __firstlineno__ __init_subclass__ "
    "__class_getitem__ __orig_bases__ __parameters__ __hash__ __eq__ __deepcopy__ __copy__ __reduce__ __reduce_ex__ "
    "__getstate__ __setstate__ __getnewargs__ __getnewargs_ex__ __sizeof__ __annotate__ __annotate_func__ "
    "__annotations_cache__ __slots__ __abstractmethods__ _abc_impl _version".split()
)


_BUILT_IN = (types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType)


def _is_torchs(function: object) -> bool:
    """Whether a function was written in PyTorch: others may have exchanged it before this package was imported."""
    code = getattr(function, "__code__", None)
    if code is None:
        return isinstance(function, _BUILT_IN)
    return code.co_filename.startswith(os.path.dirname(torch.__file__))


#: Functions that the stock classes call; where one was exchanged, stock's own code runs.
_FUNCTIONS = tuple(
    (place, name, getattr(place, name))
    for place, name in (
        (F, "conv2d"), (F, "batch_norm"), (F, "relu"), (F, "max_pool2d"), (torch, "relu"), (torch, "relu_"),
        (torch, "batch_norm"), (F, "dropout"), (F, "dropout2d"),
    )
)  # fmt: skip

#: The same of activations other than ReLU, for programs that have such.
_ACTIVATIONS = tuple(
    (F, name, getattr(F, name)) for name in ("silu", "gelu", "leaky_relu", "hardswish", "hardtanh", "relu6")
)

#: Modules that call them by way of this name.
_CALLERS = tuple(
    (place, "F", F)
    for place in (
        nn.modules.conv,
        nn.modules.batchnorm,
        nn.modules.activation,
        nn.modules.pooling,
        nn.modules.dropout,
    )
)

_EXCHANGED_BEFORE = not all(_is_torchs(known) for _, _, known in _FUNCTIONS)
_ACTIVATIONS_EXCHANGED_BEFORE = not all(_is_torchs(known) for _, _, known in _ACTIVATIONS)

#: Classes elsewhere that are known by name, so that nothing is imported for them.
FROZEN_NORMS = (("torchvision.ops.misc", "FrozenBatchNorm2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d"))
ACTIVATED_NORMS = (("timm.layers.norm_act", "BatchNormAct2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d"))
DROP_PATHS = (
    ("timm.layers.drop", "DropPath"),
    ("torchvision.ops.stochastic_depth", "StochasticDepth"),
    ("resnet_fused.models.stochastic_depth", "StochasticDepth"),
)
#: Classes whose modules make a new tensor from their argument, or write to it where ``inplace`` is true.
FRESH = (
    nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d, nn.Upsample, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
)  # fmt: skip
FRESH_FOREIGN = (("timm.layers.pool2d_same", "AvgPool2dSame"), ("timm.layers.blur_pool", "BlurPool2d"))
#: Dense layers, with the methods that their forward goes through; see :mod:`.dense`.
DENSE_LAYERS = {
    ("torchvision.models.densenet", "_DenseLayer"): ("bn_function", "any_requires_grad", "call_checkpoint_bottleneck"),
    ("timm.models.densenet", "DenseLayer"): ("bottleneck_fn", "any_requires_grad", "call_checkpoint_bottleneck"),
    ("resnet_fused.models.densenet", "DenseLayer"): ("bottleneck",),
}
_FOREIGN = frozenset((*FROZEN_NORMS, *ACTIVATED_NORMS, *DROP_PATHS, *FRESH_FOREIGN, *DENSE_LAYERS))


class _Known:
    """What was found of a class: its methods that a call goes through, and every name that is a method's."""

    def __init__(self, cls: type, *own: str) -> None:
        self.methods = tuple((name, getattr(cls, name)) for name in ("forward", *CALL, *own))
        self.called: tuple[tuple[dict, str, object], ...] = ()  # by its forward, in its own module
        checked = CALL if cls.__module__.partition(".")[0] != "torch" else (*CALL, *own)
        self.exchanged = tuple(name for name, method in self.methods if name in checked and not _is_torchs(method))
        self.hidden = frozenset(name for name in dir(cls) if callable(getattr(cls, name)) and name != "__class__")


_OWN = {nn.Conv2d: ("_conv_forward",), nn.BatchNorm2d: ("_check_input_dim",)}
_KNOWN = {
    cls: _Known(cls, *_OWN.get(cls, ()))
    for cls in (*FRESH, nn.Identity, nn.Sequential, nn.Dropout, nn.Dropout2d)
    if _is_torchs(cls.forward)
}
_samples = (nn.Conv2d(1, 1, 1, device="meta"), nn.BatchNorm2d(1, device="meta"), nn.ReLU(), nn.Identity())
#: Of each class that may be subclassed, all names that a call could look up on the instance or its class.
_PROTECTED = {type(sample): frozenset(dir(sample)) - _HARMLESS for sample in _samples}
#: Classes that were looked at and change nothing: subclasses, and those known by name.
_looked_at: dict[type, _Known] = {}


def kind(module: nn.Module) -> tuple[str, str]:
    """The class of `module` by name."""
    return own_kind(type(module))


def own_kind(cls: type) -> tuple[str, str]:
    """The name of a class, with that of its module."""
    return cls.__module__, cls.__qualname__


def exchanged(known: Iterable[tuple[object, str, object]]) -> bool:
    """Whether somebody replaced one of these functions: where each is found, its name there, what it was."""
    for place, name, function in known:  # noqa: SIM110  a loop is half the time of any()
        if getattr(place, name) is not function:
            return True
    return False


def functions_exchanged() -> bool:
    """Whether somebody replaced a function of PyTorch that the stock modules call."""
    return _EXCHANGED_BEFORE or exchanged(_CALLERS) or exchanged(_FUNCTIONS)


def activations_exchanged() -> bool:
    """The same of the functions that activations other than ReLU are."""
    return _ACTIVATIONS_EXCHANGED_BEFORE or exchanged(_ACTIVATIONS)


def _look_at(cls: type, base: type | None) -> str:
    """Why instances of `cls`, met for the first time, may not run as `base`, or as the class of that name."""
    if torch.compiler.is_compiling():
        return f"{cls.__name__} was not looked at before compiling; run it once, or call fuse()"
    if base is None:
        forward = vars(cls).get("forward")
        own = cls.__module__, f"{cls.__qualname__}.forward"
        if not isinstance(forward, types.FunctionType) or (forward.__module__, forward.__qualname__) != own:
            return f"{cls.__name__}.forward was replaced"
        if any(getattr(cls, name) is not getattr(nn.Module, name) for name in CALL):
            return f"{cls.__name__} is called in its own way"
        known = _Known(cls, *DENSE_LAYERS.get(own_kind(cls), ()))
        places = forward.__globals__
        if "F" in forward.__code__.co_names and "F" in places:
            if places["F"] is not F:
                return f"F, which {cls.__name__} calls, was replaced"
            known.called = ((places, "F", F),)
        if own_kind(cls) in DROP_PATHS:
            names = [name for name in forward.__code__.co_names if isinstance(places.get(name), types.FunctionType)]
            functions = tuple((places, name, places[name]) for name in names)
            known.called += functions
            for _, name, function in functions:
                if (function.__module__, function.__qualname__) != (cls.__module__, name):
                    return f"{name}, which {cls.__name__} calls, was replaced"
        _looked_at[cls] = known
        return ""
    for derived in cls.__mro__[: cls.__mro__.index(base)]:
        changed = sorted(_PROTECTED[base].intersection(vars(derived)))
        if changed:
            return f"{cls.__name__} changes {', '.join(changed[:3])} of {base.__name__}"
    _looked_at[cls] = _KNOWN[base]
    return ""


def known(cls: type) -> _Known:
    """What was found of a class at import, or when it was looked at."""
    return _KNOWN.get(cls) or _looked_at[cls]


def why_changed(module: nn.Module, base: type | None = None) -> str:
    """Why `module` may not run as an unchanged `base`, one of PyTorch's classes; empty if it may.

    `base` None: as the class, known by name, that it is of.
    """
    cls = type(module)
    known = _KNOWN.get(cls) if base is cls else _looked_at.get(cls)
    if known is None:
        if base is not None and base not in _KNOWN:
            return f"{base.__name__}.forward was not PyTorch's own at import"
        is_one = kind(module) in _FOREIGN if base is None else base in _PROTECTED and issubclass(cls, base)
        if not is_one:
            return f"{cls.__name__} is not {'known' if base is None else base.__name__}"
        reason = _look_at(cls, base)
        if reason:
            return reason
        known = _looked_at[cls]
    if known.exchanged:
        return f"{cls.__name__}.{known.exchanged[0]} was not PyTorch's own at import"
    for name, method in known.methods:
        if getattr(cls, name) is not method:
            return f"{cls.__name__}.{name} was replaced"
    for place, name, function in () if torch.compiler.is_compiling() else known.called:
        if place.get(name) is not function:
            return f"{name}, which {cls.__name__} calls, was replaced"
    if torch.compiler.is_compiling():  # whose isdisjoint compares each name with each, in Python: seconds for a block
        hiding = [name for name in module.__dict__ if name in known.hidden]
    else:
        hiding = () if known.hidden.isdisjoint(module.__dict__) else known.hidden.intersection(module.__dict__)
    return f"{', '.join(hiding)} of its {cls.__name__} was replaced" if hiding else ""
