"""From modules to a chain, at call time: what :mod:`.site` has found no obstacle for is run fused."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import torch

from ..backends import bounds, current
from ..ops.conv_add_relu import output_shape as conv_output_shape
from ..plan import too_small
from ..plan.choose import choose_variant, is_small, pools
from ..steps import Chain, Step, StepTensors, stock
from ..steps.layout import Placed, arrived, behind, left
from ..steps.node import run_chain
from . import gpu_inference, norms
from .inference import folded_output, runs_as_stock
from .site import Site, conv_geometry, pool_geometry

Tensor = torch.Tensor


class _Ran(threading.local):
    fused = 0


_ran = _Ran()


def fused_chains() -> int:
    """How many chains this thread has run as anything but stock operations by the plan's choice."""
    return _ran.fused


def count_fused() -> None:
    if not torch.compiler.is_compiling():
        _ran.fused += 1


def run_site(site: Site, x: Tensor, residual: Tensor | None = None, sample_factor: Tensor | None = None) -> Tensor:
    """The chain of `site` on `x`; :func:`obstacle` has found nothing against it.

    `residual`: what is added before the last ReLU (not with a shortcut). `sample_factor`: ``[N]``, see `norm_add_relu`.

    Raises:
        ValueError: one value per channel in training, as stock.
    """
    backend = site.backend if current() == "auto" else current()
    chain, tensors = _read(site, backend)
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return run_modules(chain, site, x, tensors, residual, sample_factor)
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return run_modules(chain, site, x.to(dtype), tensors, residual, sample_factor, dtype)


def _read(site: Site, backend: str) -> tuple[Chain, list[StepTensors]]:
    """The chain and the tensors of `site` as its modules are now; the same chain as long as their settings are."""
    tensors = [StepTensors(conv.weight, conv.bias, *norms.tensors(norm)) for conv, norm in site.pairs]
    known = None if torch.compiler.is_compiling() else site.unchanged
    if known is not None and not known.settings_hold():
        known = None
    if known is not None and known.read is not None and known.read.backend == backend:
        return known.read, tensors
    steps = tuple(Step(conv_geometry(conv), norms.settings(norm)) for conv, norm in site.pairs)
    n = len(site.steps)
    chain = Chain(steps[:n], None if site.shortcut is None else steps[n], site.relu, backend=backend)
    if known is not None:
        known.read = chain
    return chain, tensors


def run_modules(
    chain: Chain, site: Site, x: Tensor, tensors: list[StepTensors], residual, sample_factor, dtype=None
) -> Tensor:
    """Run `chain` in its best variant: folded inference, or the autograd node.

    `dtype`: to which the convolutions' parameters are cast, as autocast would; None: they stay.
    """
    shapes = output_shapes(chain, x, tensors)
    if any(shape[2] <= 0 or shape[3] <= 0 for shape in shapes):  # stock's convolution says what is wrong
        return stock.chain_output(chain, x, residual, sample_factor, [own.cast(dtype) for own in tensors], moves=True)
    if chain.shortcut is not None and not _shortcut_fits(chain, x, tensors[-1], shapes[-1]):
        return _broadcast_sum(chain, site, x, sample_factor, [own.cast(dtype) for own in tensors])
    if site.pool is not None:
        pooled = _pooled_chain(chain, site, x, tensors, shapes)
        if pooled is None:
            return site.pool(run_modules(chain, dataclasses.replace(site, pool=None), x, tensors, None, None, dtype))
        chain = pooled
    if residual is not None and (residual.shape != shapes[-1] or residual.dtype != x.dtype):
        # Broadcasting and promotion are stock's business: add outside of the chain.
        bare = dataclasses.replace(chain, relu=False)
        y = run_modules(bare, site, x, tensors, None, sample_factor, dtype)
        total = y.add_(residual) if site.inplace_add else y + residual  # in place it may raise
        return torch.relu(total) if chain.relu else total
    for step, shape in zip(chain.steps, shapes, strict=True):
        if step.norm.batch_stats and shape[0] * shape[2] * shape[3] == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    frozen = not any(step.norm.batch_stats for step in chain.all_steps)
    if frozen and sample_factor is None and not needs_grad(x, residual, tensors):
        if not runs_as_stock(chain, x):
            count_fused()
        return folded_output(chain, [norm for _, norm in site.pairs], x, tensors, residual, dtype)
    tensors = [own.cast(dtype) for own in tensors]
    chosen = choose_variant(chain, x, tensors, shapes, sample_factor, residual)
    if not chosen.stock:
        count_fused()
    with contextlib.nullcontext() if torch.compiler.is_compiling() else bounds.private():
        return run_chain(chosen, x, tensors, residual, sample_factor)


def _shortcut_fits(chain: Chain, x: Tensor, own: StepTensors, shape: torch.Size) -> bool:
    """Whether the projection's result has the shape of the main branch's."""
    conv = chain.shortcut.conv
    return tuple(conv_output_shape(x.shape, own.weight.shape, conv.stride, conv.padding, conv.dilation)) == shape


def _broadcast_sum(chain: Chain, site: Site, x: Tensor, sample_factor, tensors: list[StepTensors]) -> Tensor:
    """A chain whose projection has another shape than its main branch: broadcasting, and its errors, are stock's."""
    main = dataclasses.replace(chain, relu=False, shortcut=None)
    y = stock.chain_output(main, x, None, sample_factor, tensors[:-1], moves=True)
    residual = stock.conv_norm(x, tensors[-1], chain.shortcut, moves=True)
    total = y.add_(residual) if site.inplace_add else y + residual
    return torch.relu(total) if chain.relu else total


def _pooled_chain(
    chain: Chain, site: Site, x: Tensor, tensors: list[StepTensors], shapes: list[torch.Size]
) -> Chain | None:
    """`chain` with its pool in it; None where the pool is better called, or raises stock's error for this size."""
    pool = pool_geometry(site.pool)
    wanted = needs_grad(x, None, tensors) or gpu_inference.takes(x)
    if pool is None or not wanted or not pools(chain, x):
        return None
    if not gpu_inference.takes(x) and not chain.steps[-1].norm.batch_stats:
        return None  # folded, as without a pool: somebody may compare what both give
    if shapes[-1].numel() <= too_small.FEW_POOLED and is_small(chain, x, tensors, shapes):
        return None  # the chain stays stock
    if any(n + 2 * p < k for n, p, k in zip(shapes[-1][2:], pool.padding, pool.kernel, strict=True)):
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


def run_placed(site: Site, x: Placed, residual: Tensor | None = None, sample_factor: Tensor | None = None) -> Placed:
    """:func:`run_site` between fused modules: the result in whatever layout the chain gives it."""
    out = run_site(site, x.value, residual, sample_factor)
    return behind(out, x, [conv.weight for conv, _ in site.steps], site.relu and site.pool is None)


def run_as_stock(site: Site, x: Tensor, residual: Tensor | None = None, sample_factor: Tensor | None = None) -> Tensor:
    """:func:`run_site` where its result leaves fused modules: in stock's layout."""
    return left(run_placed(site, arrived(x), residual, sample_factor))
