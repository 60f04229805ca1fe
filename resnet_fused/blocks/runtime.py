"""From modules to a chain, at call time: check what is about to be bypassed, then run it fused.

A fused block owns its convolutions and norms as before and calls none of them. Whatever would have happened in those
calls (hooks, pruning, a replaced child) must still happen, so each call asks :func:`obstacle` first and runs the stock
forward where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..backends import bounds, current
from ..ops.conv_add_relu import output_shape as conv_output_shape
from ..steps import Chain, Conv, Pool, Step, StepTensors
from . import norms
from .chain import run_chain
from .inference import folded_output
from .plan import choose_variant, pools

Tensor = torch.Tensor
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")  # fmt: skip  # noqa: E501
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


def conv_geometry(conv: nn.Conv2d) -> Conv | None:
    """Geometry of a convolution module with zero padding; None where the padding is of another kind."""
    padding = conv.padding
    if conv.padding_mode != "zeros":
        return None
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = (total[0] // 2, total[1] // 2)
    return Conv(tuple(conv.stride), tuple(padding), tuple(conv.dilation), conv.groups)


def why_not_conv(conv: nn.Module) -> str:
    """Why `conv` is not a convolution this package can fuse; empty if it is one."""
    if not isinstance(conv, nn.Conv2d):
        return f"{type(conv).__name__} is not Conv2d"
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{type(conv).__name__} has a forward of its own"
    if conv_geometry(conv) is None:
        return f"padding {conv.padding!r} of mode {conv.padding_mode!r}"
    return ""


def pool_geometry(pool: nn.Module) -> Pool | None:
    """Geometry of a max pool that a chain can end in; None for every other module."""
    if type(pool) is not nn.MaxPool2d or pool.ceil_mode or pool.return_indices or _hooked(pool):
        return None
    pairs = [
        (n, n) if isinstance(n, int) else tuple(n) for n in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    ]
    kernel, stride, padding, dilation = pairs
    fits = (
        dilation == (1, 1)
        and kernel[0] * kernel[1] < 256
        and all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
    )
    return Pool(kernel, stride, padding) if fits else None


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def module_obstacle(site: Site) -> str:
    """Why the modules of `site` must be called one by one; empty if they may be bypassed."""
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "global module hooks"
    for conv, norm in site.pairs:
        reason = why_not_conv(conv) or norms.why_not(norm)
        if reason:
            return reason
        if norms.channels(norm) != conv.out_channels:
            return "a norm and a convolution of different widths"
        if _hooked(conv) or _hooked(norm):
            return "hooks on a convolution or batch norm"
    if any(_hooked(module) for module in site.bypassed):
        return "hooks on an activation or shortcut"
    return ""


def input_obstacle(x: object, site: Site) -> str:
    """Why this input needs the stock forward (unusual, or an error that stock words better); empty if it does not."""
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "traced for a graph of stock operations"
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or x.numel() == 0:
        return "not a batch of images"
    weight = site.steps[0][0].weight
    if x.shape[1] != weight.shape[1] * site.steps[0][0].groups:
        return "channels that the convolution does not take"
    if x.device != weight.device or not x.is_floating_point():
        return "device or dtype of another kind"
    if not torch.is_autocast_enabled(x.device.type) and x.dtype != weight.dtype:
        return "input and weight of different dtypes"
    if torch.compiler.is_compiling():
        return ""
    if type(x) not in (torch.Tensor, nn.Parameter) and not _is_tracing_tensor(x):
        return f"a tensor of class {type(x).__name__}"
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return "a function transform or forward-mode differentiation"
    return ""


def _is_tracing_tensor(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor | torch._subclasses.functional_tensor.FunctionalTensor)


def obstacle(x: object, site: Site) -> str:
    """Why this call must run the stock forward; empty if it can run fused."""
    return module_obstacle(site) or input_obstacle(x, site)


def run_site(site: Site, x: Tensor, residual: Tensor | None = None, sample_factor: Tensor | None = None) -> Tensor:
    """The chain of `site` on `x`; :func:`obstacle` has found nothing against it.

    `residual`: what is added before the last ReLU (not with a shortcut). `sample_factor`: ``[N]``, see `norm_add_relu`.

    Raises:
        ValueError: one value per channel in training, as stock.
    """
    backend = site.backend if current() == "auto" else current()
    steps = tuple(Step(conv_geometry(conv), norms.settings(norm)) for conv, norm in site.pairs)
    tensors = [StepTensors(conv.weight, conv.bias, *norms.tensors(norm)) for conv, norm in site.pairs]
    n = len(site.steps)
    chain = Chain(steps[:n], None if site.shortcut is None else steps[n], site.relu, backend=backend)
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return run_modules(chain, site, x, tensors, residual, sample_factor)
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return run_modules(chain, site, x.to(dtype), tensors, residual, sample_factor, dtype)


def run_modules(
    chain: Chain, site: Site, x: Tensor, tensors: list[StepTensors], residual, sample_factor, dtype=None
) -> Tensor:
    """Run `chain` in its best variant: folded inference, or the autograd node.

    `dtype`: to which the convolutions' parameters are cast, as autocast would; None: they stay.
    """
    shapes = output_shapes(chain, x, tensors)
    if site.pool is not None:
        pooled = _pooled_chain(chain, site, x, tensors, shapes[-1])
        if pooled is None:
            return site.pool(run_modules(chain, dataclasses.replace(site, pool=None), x, tensors, None, None, dtype))
        chain = pooled
    if residual is not None and (residual.shape != shapes[-1] or residual.dtype != x.dtype):
        # Broadcasting and promotion are stock's business: add outside of the chain.
        bare = dataclasses.replace(chain, relu=False)
        y = run_modules(bare, site, x, tensors, None, sample_factor, dtype)
        total = (y + residual).to(y.dtype) if site.inplace_add else y + residual
        return torch.relu(total) if chain.relu else total
    for step, shape in zip(chain.steps, shapes, strict=True):
        if step.norm.batch_stats and shape[0] * shape[2] * shape[3] == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    frozen = not any(step.norm.batch_stats for step in chain.all_steps)
    if frozen and sample_factor is None and not needs_grad(x, residual, tensors):
        return folded_output(chain, [norm for _, norm in site.pairs], x, tensors, residual, dtype)
    tensors = [own.cast(dtype) for own in tensors]
    chosen = choose_variant(chain, x, tensors, shapes, sample_factor, residual)
    with contextlib.nullcontext() if torch.compiler.is_compiling() else bounds.private():
        return run_chain(chosen, x, tensors, residual, sample_factor)


def _pooled_chain(chain: Chain, site: Site, x: Tensor, tensors: list[StepTensors], shape: torch.Size) -> Chain | None:
    """`chain` with its pool in it; None where the pool is better called, or raises stock's error for this size."""
    pool = pool_geometry(site.pool)
    if pool is None or not needs_grad(x, None, tensors) or not pools(chain, x):
        return None
    if any(n + 2 * p < k for n, p, k in zip(shape[2:], pool.padding, pool.kernel, strict=True)):
        return None
    return dataclasses.replace(chain, pool=pool)


def output_shapes(chain: Chain, x: Tensor, tensors: list[StepTensors]) -> list[torch.Size]:
    """Shape behind each step of the main branch."""
    shapes, h = [], x.shape
    for step, own in zip(chain.steps, tensors, strict=False):
        h = torch.Size(conv_output_shape(h, own.weight.shape, step.conv.stride, step.conv.padding, step.conv.dilation))
        shapes.append(h)
    return shapes


def needs_grad(x: Tensor, residual: Tensor | None, tensors: list[StepTensors]) -> bool:
    """Whether autograd wants anything from this call."""
    if not torch.is_grad_enabled():
        return False
    candidates = [x, residual, *(t for own in tensors for t in own[:4])]
    return any(t is not None and t.requires_grad for t in candidates)
