"""The modules that a chain stands in for, and whether this call may bypass them.

A fused block owns its convolutions and norms as before and calls none of them. Whatever would have happened in those
calls (hooks, pruning, a replaced child or method) must still happen, so each call asks :func:`module_obstacle` and
:func:`input_obstacle` first and runs the stock forward where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..steps import Conv, Pool
from . import norms, proven
from .unchanged import Unchanged

Tensor = torch.Tensor
_PASSED = (nn.ReLU, nn.Identity, nn.Sequential)  # by their exact class, or DropPath


@dataclasses.dataclass(frozen=True)
class Site:
    """The modules of a chain: ``(convolution, norm)`` for each step, and those that the chain stands in for."""

    steps: tuple[tuple[nn.Conv2d, nn.Module], ...]
    shortcut: tuple[nn.Conv2d, nn.Module] | None = None
    relu: bool = True
    inplace_add: bool = True  # the residual is added with ``+=``: the result keeps the main branch's dtype
    pool: nn.MaxPool2d | None = None  # behind the last ReLU
    bypassed: tuple[nn.Module, ...] = ()  # activations and containers that are not called either
    backend: str = "auto"

    @property
    def pairs(self) -> tuple[tuple[nn.Conv2d, nn.Module], ...]:
        return self.steps if self.shortcut is None else (*self.steps, self.shortcut)

    @property
    def unchanged(self) -> Unchanged | None:
        """The modules as :func:`module_obstacle` last found nothing against them; None: it reads them at every call."""
        return self.__dict__.get("_unchanged") or None


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)


def conv_geometry(conv: nn.Conv2d) -> Conv | None:
    """Geometry of a convolution module with zero padding; None where the padding is of another kind."""
    padding, dilation = conv.padding, _pair(conv.dilation)
    if conv.padding_mode != "zeros":
        return None
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, conv.weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = (total[0] // 2, total[1] // 2)
    stride, padding = _pair(conv.stride), _pair(padding)
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


def why_not_passed(module: nn.Module) -> str:
    """Why `module`, an activation, container or drop path, may not be bypassed; empty if it may."""
    cls = type(module)
    return proven.why_changed(module, cls if cls in _PASSED else None)


def pool_geometry(pool: nn.Module) -> Pool | None:
    """Geometry of a max pool that a chain can end in; None for every other module."""
    if proven.why_changed(pool, nn.MaxPool2d) or pool.ceil_mode or pool.return_indices or hooked(pool):
        return None
    stride = pool.kernel_size if pool.stride is None else pool.stride
    kernel, stride, padding, dilation = map(_pair, (pool.kernel_size, stride, pool.padding, pool.dilation))
    fits = (
        dilation == (1, 1)
        and kernel[0] * kernel[1] < 256
        and all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
    )
    return Pool(kernel, stride, padding) if fits else None


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


def module_obstacle(site: Site) -> str:
    """Why the modules of `site` must be called one by one; empty if they may be bypassed."""
    if globally_hooked():
        return "global module hooks"
    if proven.functions_exchanged():
        return "a function of torch that the modules call was replaced"
    known = None
    if not torch.compiler.is_compiling():
        known = site.__dict__.get("_unchanged")
        if known and known.holds():
            return _pool_obstacle(site.pool)
        known = Unchanged(site.pairs, site.bypassed) if known is not False else None
    reason = _obstacle_read(site)
    if known is not None and not reason and known.is_plain():
        site.__dict__["_unchanged"] = known if known.is_complete() else False
    return reason


def _obstacle_read(site: Site) -> str:
    """:func:`module_obstacle` by reading every module."""
    for conv, norm in site.pairs:
        reason = why_not_conv(conv) or norms.why_not(norm) or norms.obstacle(norm)
        if reason:
            return reason
        act = norms.activation_of(norm)
        if act is not None and all(act is not module for module in site.bypassed):
            return "a norm with an activation of its own"
        if hooked(conv) or hooked(norm):
            return "hooks on a convolution or batch norm"
    for module in site.bypassed:
        reason = why_not_passed(module)
        if reason:
            return reason
        if hooked(module):
            return "hooks on an activation or shortcut"
    return _pool_obstacle(site.pool) or _tensor_obstacle(site)


def _pool_obstacle(pool: nn.Module | None) -> str:
    """Why a pool, whatever stands in its place by now, may not even be called behind a chain: what it returns."""
    if pool is None:
        return ""
    if hooked(pool) or getattr(pool, "return_indices", False):
        return "a pool with hooks, or that returns more than one tensor"
    return proven.why_changed(pool, nn.MaxPool2d)


def _tensor_obstacle(site: Site) -> str:
    """Why the parameters of `site` are not those of a chain: another class, device, dtype or shape than fit together.

    Batch norm takes float32 vectors with 16-bit convolutions, and no other mixture.
    """
    first = site.steps[0][0]
    device, dtype, channels = first.weight.device, first.weight.dtype, first.weight.shape[1] * first.groups
    wide, entering = torch.float32 if dtype.itemsize == 2 else dtype, channels
    for conv, norm in site.pairs:
        weight, bias, vectors = conv.weight, conv.bias, norms.vectors(norm)
        if site.shortcut is not None and conv is site.shortcut[0]:
            entering = channels
        if weight.dim() != 4 or weight.size(1) * conv.groups != entering:
            return "a convolution that does not take what comes before it"
        if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
            return "convolutions of different dtypes"
        entering = weight.size(0)
        if norms.channels(norm) != entering:
            return "a norm and a convolution of different widths"
        for t in (weight, bias, *vectors):
            if t is None:
                continue
            if t.device != device:
                return "parameters on several devices"
            if not is_plain(t):
                return f"a parameter of class {type(t).__name__}"
            if is_odd(t):
                return "a parameter of an unusual layout"
            if t is not weight and (t.dim() != 1 or t.numel() != entering):
                return "a norm and a convolution of different widths"
        if any(t is not None and t.dtype != dtype and t.dtype != wide for t in vectors):
            return "a batch norm of a dtype that its convolution's result has not"
    return ""


def is_odd(t: Tensor) -> bool:
    """Whether the memory of a parameter or buffer is not simply that of its elements."""
    if torch.compiler.is_compiling():
        return False
    return t.layout is not torch.strided or t.is_neg() or (t.dim() == 1 and t.stride(0) == 0 and t.numel() > 1)


def is_plain(t: Tensor) -> bool:
    """Whether `t` is a tensor whose operations are PyTorch's own; in a graph, which knows no others, every one is."""
    cls = type(t)
    if cls is nn.Parameter or cls is torch.Tensor or torch.compiler.is_compiling() or _is_tracing_tensor(t):
        return True
    return _settings.gathered and cls.__name__ == "DTensor"


class _Settings:
    gathered = False


_settings = _Settings()


@contextlib.contextmanager
def as_gathered(model: nn.Module) -> Iterator[None]:
    """Within this, parameters that FSDP2 has sharded count as what they are within a call of `model`: plain tensors."""
    sharded = any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__)
    before, _settings.gathered = _settings.gathered, sharded
    try:
        yield
    finally:
        _settings.gathered = before


def input_obstacle(x: object, site: Site, channels: bool = True) -> str:
    """Why this input needs the stock forward (unusual, or an error that stock words better); empty if it does not.

    `channels`: whether it is what the chain of `site` reads, so that it must have as many.
    """
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "traced for a graph of stock operations"
    if not isinstance(x, torch.Tensor) or x.is_nested or x.dim() != 4 or x.numel() == 0 or x.layout != torch.strided:
        return "not a batch of images"
    if x.device.type not in ("cpu", "cuda"):
        return f"a tensor on {x.device.type}"
    weight = site.steps[0][0].weight
    if channels and x.shape[1] != weight.shape[1] * site.steps[0][0].groups:
        return "channels that the convolution does not take"
    if x.device != weight.device or not x.is_floating_point():
        return "device or dtype of another kind"
    if not torch.is_autocast_enabled(x.device.type) and x.dtype != weight.dtype:
        return "input and weight of different dtypes"
    if torch.compiler.is_compiling():
        return ""
    if not is_plain(x):
        return f"a tensor of class {type(x).__name__}"
    if x.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return "a tensor of inference mode, which autograd may not save"
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return "a function transform or forward-mode differentiation"
    return _mode_obstacle()


def _mode_obstacle() -> str:
    """Why a mode of PyTorch that sees every operation must see stock's (a FLOP counter, a policy of checkpointing).

    A dispatch mode that wants to see this package's ops says so by an attribute ``sees_fused_ops = True``.
    """
    for i in range(torch._C._len_torch_function_stack()):
        if not isinstance(torch._C._get_function_stack_at(i), DeviceContext):
            return "a mode that overrides torch functions"
    if torch._C._len_torch_dispatch_stack():
        for mode in _get_current_dispatch_mode_stack():
            if not getattr(mode, "sees_fused_ops", isinstance(mode, torch._subclasses.FakeTensorMode)):
                return f"a dispatch mode, {type(mode).__name__}"
    return ""


def _is_tracing_tensor(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor | torch._subclasses.functional_tensor.FunctionalTensor)


def obstacle(x: object, site: Site) -> str:
    """Why this call must run the stock forward; empty if it can run fused."""
    return module_obstacle(site) or input_obstacle(x, site)
