"""Read convolutions, pools and what else a program passes over: geometry, hooks, and why one must be called."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

from ..ops import activation
from ..steps import Act, Average, Conv, Pool
from . import drop_paths, proven

_ACTS = (nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish, nn.ReLU6)
_SETTINGS = {nn.LeakyReLU: ("negative_slope",), nn.GELU: ("approximate",), nn.ReLU6: ("min_val", "max_val")}
#: Classes whose forward reads ``self.inplace``.
_INPLACE = (nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.Hardswish, nn.ReLU6, nn.Dropout, nn.Dropout2d)
#: By their exact class, or DropPath.
_PASSED = (nn.ReLU, nn.Identity, nn.Sequential, nn.Dropout, nn.Dropout2d, *_ACTS)


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A setting of height and width, as PyTorch reads it."""
    return (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)


def conv_geometry(conv: nn.Conv2d) -> Conv | None:
    """Geometry of a convolution module with zero padding; None where the padding is of another kind."""
    padding, dilation = conv.padding, pair(conv.dilation)
    if conv.padding_mode != "zeros":
        return None
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, conv.weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = (total[0] // 2, total[1] // 2)
    stride, padding = pair(conv.stride), pair(padding)
    usual = len(stride) == len(padding) == len(dilation) == 2 and min(*stride, *dilation, conv.groups) > 0
    return Conv(stride, padding, dilation, conv.groups) if usual else None


def why_not_conv(conv: nn.Module) -> str:
    """Why `conv` is not a convolution this package can fuse; empty if it is one."""
    reason = proven.why_changed(conv, nn.Conv2d)
    if reason:
        return reason
    if conv.weight is None:
        return "a convolution without a weight"
    if conv_geometry(conv) is not None:
        return ""
    geometry = f"padding {conv.padding!r} of mode {conv.padding_mode!r}"
    return geometry if conv.padding_mode != "zeros" or type(conv.padding) is str else "a geometry of odd numbers"


def act_of(module: nn.Module | None) -> Act | None:
    """What an activation module other than ReLU computes now; None for every other module, and odd or lost settings."""
    cls = type(module)
    if cls is nn.SiLU or cls is nn.Hardswish:
        return Act(activation.SILU if cls is nn.SiLU else activation.HARDSWISH)
    if cls is nn.GELU:
        return gelu(getattr(module, "approximate", None))
    if cls is nn.LeakyReLU:
        return leaky_relu(getattr(module, "negative_slope", None))
    bounds = (getattr(module, "min_val", None), getattr(module, "max_val", None)) if cls is nn.ReLU6 else ()
    return Act(activation.RELU6) if bounds == (0, 6) else None


def gelu(approximate: object) -> Act | None:
    """The GELU that PyTorch names so."""
    code = {"none": activation.GELU, "tanh": activation.GELU_TANH}.get(approximate)
    return None if code is None else Act(code)


def leaky_relu(slope: object) -> Act | None:
    """A leaky ReLU that makes nothing larger, and whose sign is that of its argument: also where it works in place."""
    return Act(activation.LEAKY_RELU, float(slope)) if isinstance(slope, int | float) and 0 <= slope <= 1 else None


def kind_of(module: nn.Module) -> str:
    """What a module that is passed over is: its class, and what of its settings a program holds."""
    cls = type(module)
    return cls.__name__ + "".join(f" {getattr(module, name, None)!r}" for name in _SETTINGS.get(cls, ()))


def why_not_passed(module: nn.Module) -> str:
    """Why `module`, an activation, container or drop path, may not be bypassed; empty if it may."""
    cls = type(module)
    if cls in _INPLACE and "inplace" not in module.__dict__:
        return f"inplace of its {cls.__name__} was removed"
    reason = proven.why_changed(module, cls if cls in _PASSED else None)
    return reason or (drop_paths.why_not(module) if drop_paths.is_one(module) else "")


def why_not_pool(pool: nn.Module) -> str:
    """Why a pool, whatever stands in its place by now, may not even be called behind a program: what it returns."""
    reason = proven.why_changed(pool, nn.MaxPool2d)
    return reason or ("a pool that returns more than one tensor" if pool.return_indices else "")


def pool_geometry(pool: nn.Module) -> Pool | None:
    """Geometry of a max pool that a program can end in; None for every other module."""
    if why_not_pool(pool) or pool.ceil_mode or hooked(pool):
        return None
    stride = pool.kernel_size if pool.stride is None else pool.stride
    kernel, stride, padding, dilation = map(pair, (pool.kernel_size, stride, pool.padding, pool.dilation))
    fits = (
        dilation == (1, 1)
        and kernel[0] * kernel[1] < 256
        and all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
    )
    return Pool(kernel, stride, padding) if fits else None


def average_geometry(pool: nn.Module) -> Average | None:
    """Geometry of an average pool; None where it has odd numbers."""
    given = pool.kernel_size, pool.kernel_size if pool.stride is None else pool.stride, pool.padding
    sizes = [(n, n) if isinstance(n, int) else tuple(n) if isinstance(n, tuple | list) else () for n in given]
    sizes = [size * 2 if len(size) == 1 else size for size in sizes]
    if not all(len(size) == 2 and all(isinstance(n, int) for n in size) for size in sizes):
        return None
    kernel, stride, padding = sizes
    usual = min(*kernel, *stride) > 0 and all(0 <= 2 * p <= k for p, k in zip(padding, kernel, strict=True))
    if not usual or not isinstance(pool.divisor_override, int | None) or pool.divisor_override == 0:
        return None
    return Average(kernel, stride, padding, bool(pool.ceil_mode), bool(pool.count_include_pad), pool.divisor_override)


def why_not_average(pool: nn.Module) -> str:
    """Why `pool` is not an average pool that this package can run; empty if it is one."""
    reason = proven.why_changed(pool, nn.AvgPool2d)
    return reason or ("an average pool of odd numbers" if average_geometry(pool) is None else "")


def hooked(module: nn.Module) -> bool:
    """Whether a call of `module` would run hooks."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def hooked_within(module: nn.Module) -> bool:
    """Whether a call of `module` may run hooks, its own or those of a module in it."""
    return hooked(module) or any(inner is not None and hooked_within(inner) for inner in module._modules.values())


def globally_hooked() -> bool:
    """Whether a call of any module would run hooks."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
