"""Whether the tensors of a call are such that its modules may be bypassed."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..plan.choose import setting


def is_odd(t: Tensor) -> bool:
    """Whether the memory of a parameter or buffer is not simply that of its elements."""
    if torch.compiler.is_compiling():
        return False
    return t.layout is not torch.strided or t.is_neg() or (t.dim() == 1 and t.stride(0) == 0 and t.numel() > 1)


def is_plain(t: Tensor) -> bool:
    """Whether `t` is a tensor whose operations are PyTorch's own; in a graph, which knows no others, every one is."""
    cls = type(t)
    if cls is nn.Parameter or cls is Tensor or torch.compiler.is_compiling() or isinstance(t, _TRACING):
        return True
    return _settings.gathered and cls.__name__ == "DTensor"


_TRACING = torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor


class _Settings:
    gathered = False


_settings = _Settings()


def as_gathered(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within this, parameters that FSDP2 has sharded count as what they are within a call of `model`: plain tensors."""
    sharded = any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__)
    return setting(_settings, "gathered", sharded)


def input_obstacle(x: object, weight: Tensor, channels: int | None) -> str:
    """Why this input needs the stock forward (unusual, or an error that stock words better); empty if it does not.

    `weight`: of the first convolution. `channels`: that `x` must have; None: others read it first.
    """
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "traced for a graph of stock operations"
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 4 or x.numel() == 0 or x.layout != torch.strided:
        return "not a batch of images"
    if x.device.type not in ("cpu", "cuda"):
        return f"a tensor on {x.device.type}"
    if channels is not None and x.shape[1] != channels:
        return "channels that the first module does not take"
    if x.device != weight.device or not x.is_floating_point():
        return "device or dtype of another kind"
    wide = torch.float64 in (x.dtype, weight.dtype)  # which autocast leaves alone
    if x.dtype != weight.dtype and (wide or not torch.is_autocast_enabled(x.device.type)):
        return "input and weight of different dtypes"
    if torch.compiler.is_compiling():
        return ""
    if not is_plain(x):
        return f"a tensor of class {type(x).__name__}"
    if x.is_neg():
        return "a view whose elements are still to be negated"
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
