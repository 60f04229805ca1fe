"""A stock module whose class was swapped for a subclass that runs its program.

Swapping the class leaves everything a user can hold on to as it was: the object, its children, parameters, hooks,
``state_dict`` and ``isinstance``. The stock forward stays one ``super()`` away, and is what runs wherever a call cannot
be fused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from ..blocks.runtime import Site, input_obstacle, module_obstacle, run_site
from . import swap
from .program import ChainCall, Program, Ref, StockCall, is_drop_path
from .swap import STATE
from .trace import state_of

Tensor = torch.Tensor


class _Settings:
    """Process-wide: a plain attribute is what ``torch.compile`` can guard on."""

    stock = False


_settings = _Settings()


@contextlib.contextmanager
def stock_forward() -> Iterator[None]:
    """Run every fused module's stock forward within a ``with`` block: how to compare without a second model."""
    before, _settings.stock = _settings.stock, True
    try:
        yield
    finally:
        _settings.stock = before


def is_stock_forced() -> bool:
    """Whether a :func:`stock_forward` block is open."""
    return _settings.stock


@dataclasses.dataclass
class FusedState:
    """What a fused module carries; plain data, so that it copies and pickles."""

    program: Program
    traced: tuple  # see trace.state_of
    backend: str
    reasons: tuple[str, ...] = ()  # why parts of the block stayed stock


def site_of(block: nn.Module, call: ChainCall, backend: str) -> Site:
    """The modules that `call` names in `block`."""
    find = block.get_submodule
    return Site(
        steps=tuple((find(conv), find(norm)) for conv, norm in call.steps),
        shortcut=None if call.shortcut is None else (find(call.shortcut[0]), find(call.shortcut[1])),
        relu=call.relu,
        inplace_add=call.inplace_add,
        pool=None if call.pool is None else find(call.pool),
        bypassed=tuple(find(name) for name in call.bypassed),
        backend=backend,
    )


_sites: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, list[Site]]] = weakref.WeakKeyDictionary()


def sites_of(block: nn.Module, state: FusedState) -> list[Site]:
    """The sites of every chain of `block`; looked up by name again only when a child was replaced."""
    if torch.compiler.is_compiling():
        return [site_of(block, call, state.backend) for call in state.program.chains]
    children = [*block._modules.values()]
    for name, _ in state.program.containers:
        children += block.get_submodule(name)._modules.values()
    key = (state.backend, *map(id, children))
    known = _sites.get(block)
    if known is None or known[0] != key:
        known = key, [site_of(block, call, state.backend) for call in state.program.chains]
        _sites[block] = known
    return known[1]


def obstacle(block: nn.Module, state: FusedState, sites: list[Site]) -> str:
    """Why the modules of a fused block must be called one by one now; empty if they need not."""
    if block._resnet_fused_replaced("forward"):
        return "its class was given another forward after fuse()"
    if state_of(block) != state.traced:
        return "the block was changed after fuse(); call fuse() again"
    for name, length in state.program.containers:
        container = block.get_submodule(name)
        if type(container) is not nn.Sequential or len(container) != length:
            return f"{name} was changed after fuse(); call fuse() again"
        if container._forward_hooks or container._forward_pre_hooks or container._backward_hooks:
            return f"hooks on {name}"
    for site in sites:
        if any(type(module) not in _BYPASSABLE and not is_drop_path(module) for module in site.bypassed):
            return "an activation was changed after fuse(); call fuse() again"
        reason = module_obstacle(site)
        if reason:
            return reason
    return ""


_BYPASSABLE = (nn.ReLU, nn.Identity)


def _drop_factor(block: nn.Module, call: ChainCall, x: Tensor, site: Site) -> Tensor | None:
    """The per-sample factor of timm's drop path: its random call, its scaling."""
    if call.drop_path is None:
        return None
    drop = block.get_submodule(call.drop_path)
    if drop.drop_prob == 0.0 or not drop.training:
        return None
    keep = 1 - drop.drop_prob
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    factor = x.new_empty((x.shape[0], 1, 1, 1), dtype=dtype).bernoulli_(keep)
    if keep > 0.0 and drop.scale_by_keep:
        factor.div_(keep)
    return factor.view(-1)


def _run_stock(block: nn.Module, call: StockCall, values: dict[str, Tensor]) -> object:
    def value(arg: object) -> object:
        if isinstance(arg, Ref):
            return values[arg.name]
        if isinstance(arg, tuple | list):
            return type(arg)([value(item) for item in arg])
        return arg

    args, kwargs = [value(arg) for arg in call.args], {key: value(arg) for key, arg in call.kwargs}
    if call.op == "call_module":
        return block.get_submodule(call.target)(*args, **kwargs)
    if call.op == "call_method":
        return getattr(args[0], call.target)(*args[1:], **kwargs)
    return call.target(*args, **kwargs)


def run_program(block: nn.Module, state: FusedState, sites: list[Site], x: Tensor) -> Tensor:
    """The block's output: chains fused, everything between them stock."""
    values, remaining = {state.program.input: x}, iter(sites)
    for call in state.program.calls:
        if isinstance(call, StockCall):
            values[call.output] = _run_stock(block, call, values)
            continue
        site, h = next(remaining), values[call.input]
        residual = None if call.residual is None else values[call.residual]
        values[call.output] = run_site(site, h, residual, _drop_factor(block, call, h, site))
    return values[state.program.result]


class FusedModule(swap.Swapped):
    """Mixin in front of a stock class: its forward runs the program, or the stock forward where it must."""

    def forward(self, x):
        if _settings.stock:
            return super().forward(x)
        state: FusedState | None = self.__dict__.get(STATE)
        if state is None:
            return super().forward(x)
        sites = sites_of(self, state)
        if obstacle(self, state, sites) or input_obstacle(x, sites[0]):
            return super().forward(x)
        return run_program(self, state, sites, x)


def fused_class(stock_class: type) -> type:
    """The fused subclass of `stock_class`; carries its name, so that ``repr`` and logs stay readable."""
    return swap.subclass(FusedModule, stock_class, (fused_class, (stock_class,)))
