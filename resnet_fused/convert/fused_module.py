"""A stock module whose class was swapped for a subclass that runs its program.

Swapping the class leaves everything a user can hold on to as it was: the object, its children, parameters, hooks,
``state_dict`` and ``isinstance``. The stock forward stays one ``super()`` away, and is what runs wherever a call cannot
be fused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..blocks import program_site, whole
from ..blocks.program_site import ProgramSite, Shape
from ..blocks.runtime import run_placed
from ..blocks.site import Site, hooked, hooked_within, input_obstacle, module_obstacle, why_not_passed
from ..steps.layout import Placed, arrived, left
from . import as_stock, swap
from .instructions import ChainCall, Program, Ref, StockCall, resolve
from .order import module_effect
from .outside import Outside, globals_reader
from .swap import STATE
from .trace import fingerprint, value_of

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
    traced: tuple  # what the forward reads of the block, see trace.state_of
    code: str  # of the forward that was traced, see trace.fingerprint
    backend: str
    outside: Outside  # what the forward reads outside of the block
    reasons: tuple[str, ...] = ()  # why parts of the block stayed stock
    whole: Shape | None = None  # all of the forward as one program, where that is more than one chain


def site_of(block: nn.Module, call: ChainCall, backend: str) -> Site:
    """The modules that `call` names in `block`."""
    find = block.get_submodule
    return Site(
        steps=tuple((find(conv), find(norm)) for conv, norm in call.steps),
        shortcut=None if call.shortcut is None else (find(call.shortcut[0]), find(call.shortcut[1])),
        relu=call.relu,
        inplace_add=call.inplace_add,
        pool=None if call.pool is None else find(call.pool),
        bypassed=tuple(find(name) for name, _ in call.bypassed),
        backend=backend,
    )


_sites: weakref.WeakKeyDictionary[nn.Module, tuple[Program, tuple, list[Site]]] = weakref.WeakKeyDictionary()


def sites_of(block: nn.Module, state: FusedState) -> list[Site]:
    """The sites of every chain of `block`; looked up by name again only when a child was replaced.

    Empty where a child is missing, which :func:`obstacle` reports.
    """
    if torch.compiler.is_compiling():
        return _find_sites(block, state)
    key = (state.backend, *map(id, block._modules.values()))
    for name in state.program.parents:
        holder = find(block, name)
        key += () if holder is None else (*map(id, holder._modules.values()),)
    known = _sites.get(block)
    if known is None or known[0] is not state.program or known[1] != key:
        known = state.program, key, _find_sites(block, state)
        _sites[block] = known
    return known[2]


def _find_sites(block: nn.Module, state: FusedState) -> list[Site]:
    if _missing(block, state.program):
        return []
    return [site_of(block, call, state.backend) for call in state.program.chains]


def find(block: nn.Module, name: str) -> nn.Module | None:
    """The module of that dotted name; None where there is none."""
    found: nn.Module | None = block
    for atom in name.split("."):
        found = None if found is None else found._modules.get(atom)
    return found


def _missing(block: nn.Module, program: Program) -> str:
    """The name of a module that the program calls or stands in for and `block` no longer has; empty if it has all."""
    for name in program.modules:
        if find(block, name) is None:
            return name
    return ""


def obstacle(block: nn.Module, state: FusedState, sites: list[Site]) -> str:
    """Why the modules of a fused block must be called one by one now; empty if they need not."""
    if not runs_as_traced(block, state):
        return "its forward, or what it reads, was changed after fuse(); call fuse() again"
    if not sites:
        return f"{_missing(block, state.program)} was removed after fuse(); call fuse() again"
    for name, length in state.program.containers:
        container = find(block, name)
        if type(container) is not nn.Sequential or len(container) != length or why_not_passed(container):
            return f"{name} was changed after fuse(); call fuse() again"
        if hooked(container):
            return f"hooks on {name}"
    for name, kind, effect in state.program.between:
        module = find(block, name)
        if type(module).__name__ != kind or module_effect(module) != effect:
            return f"{name} was changed after fuse(); call fuse() again"
        if hooked_within(module):
            return f"hooks on or in {name}, which is called within a chain"
    for call, site in zip(state.program.chains, sites, strict=True):
        for (name, kind), module in zip(call.bypassed, site.bypassed, strict=True):
            if type(module).__name__ != kind:
                return f"{name} was changed after fuse(); call fuse() again"
        reason = module_obstacle(site)
        if reason:
            return reason
    return ""


def runs_as_traced(block: nn.Module, state: FusedState) -> bool:
    """Whether the stock forward is the one that was traced, and finds in the block what it found then."""
    if state.code != block._resnet_fused_code or block._resnet_fused_replaced("forward"):
        return False
    if not state.outside.is_kept(type(block)._resnet_fused_reader):
        return False
    return all(value_of(block, name) == value for name, value in state.traced)


def drop_factor(block: nn.Module, name: str | None, x: Tensor) -> Tensor | None:
    """The per-sample factor of timm's drop path of that name: its random call, its scaling."""
    if name is None:
        return None
    drop = block.get_submodule(name)
    if drop.drop_prob == 0.0 or not drop.training:
        return None
    keep = 1 - drop.drop_prob
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    factor = x.new_empty((x.shape[0], 1, 1, 1), dtype=dtype).bernoulli_(keep)
    if keep > 0.0 and drop.scale_by_keep:
        factor.div_(keep)
    return factor.view(-1)


def _run_stock(block: nn.Module, call: StockCall, values: dict[str, object]) -> object:
    args = [resolve(arg, values) for arg in call.args]
    kwargs = {key: resolve(arg, values) for key, arg in call.kwargs}
    if call.op == "call_module":
        return block.get_submodule(call.target)(*args, **kwargs)
    if call.op == "call_method":
        return getattr(args[0], call.target)(*args[1:], **kwargs)
    return call.target(*args, **kwargs)


_whole_sites: weakref.WeakKeyDictionary[nn.Module, tuple[list[Site], ProgramSite]] = weakref.WeakKeyDictionary()


def _whole_site(block: nn.Module, state: FusedState, sites: list[Site]) -> ProgramSite:
    """The modules of the whole; looked up again only when those of the chains were."""
    known = _whole_sites.get(block)
    if known is None or known[0] is not sites:
        shape = state.whole
        modules = tuple(block.get_submodule(name) if name else None for name in shape.names)
        bypassed = tuple(block.get_submodule(name) for name, _ in shape.bypassed)
        known = sites, ProgramSite(shape, modules, bypassed, state.backend)
        _whole_sites[block] = known
    return known[1]


def _run_whole(block: nn.Module, state: FusedState, sites: list[Site], x: Placed) -> object | None:
    """The block's output as one program's, or, where that would not gain, its stock forward's; None: by chains."""
    if torch.compiler.is_compiling() or is_stock_forced():
        return None
    site = _whole_site(block, state, sites)
    if not whole.takes(site, x.value):
        return None
    out = whole.run_whole(site, x, lambda: drop_factor(block, site.shape.drop_path, x.value))
    return swap.stock_class(block).forward(block, left(x)) if out is None else out


def whole_obstacle(block: nn.Module, state: FusedState) -> str:
    """Why a block that is one program runs as chains all the same, in training; empty if it does not, or is none."""
    if state.whole is None:
        return ""
    site = _whole_site(block, state, sites_of(block, state))
    reason = program_site.obstacle(site)
    if reason or program_site.normalises_with_batch(site):
        return reason
    return "in evaluation, and with frozen batch norms, by chains"


def run_program(block: nn.Module, state: FusedState, sites: list[Site], x: Tensor | Placed) -> object:
    """The block's output: of the whole as one program; or chains fused, and everything between them stock.

    What is called in between gets values in stock's layout.
    """
    if state.whole is not None:
        out = _run_whole(block, state, sites, placed(x))
        if out is not None:
            return out
    values, remaining = {state.program.input: x}, iter(sites)
    for call in state.program.calls:
        if isinstance(call, StockCall):
            values[call.output] = _run_stock(block, call, values)
            continue
        site, h = next(remaining), placed(values[call.input])
        residual = None if call.residual is None else placed(values[call.residual]).value
        values[call.output] = run_placed(site, h, residual, drop_factor(block, call.drop_path, h.value))
    result = state.program.result
    return values[result.name] if isinstance(result, Ref) else resolve(result, values)


def placed(value: Tensor | Placed) -> Placed:
    """A value as chains take it."""
    return value if isinstance(value, Placed) else arrived(value)


def runnable(block: nn.Module) -> tuple[FusedState, list[Site]] | None:
    """What `block` runs fused now, if its input allows; None where it runs its stock forward."""
    state: FusedState | None = block.__dict__.get(STATE)
    if state is None or _settings.stock:
        return None
    sites = sites_of(block, state)
    return None if obstacle(block, state, sites) else (state, sites)


def entry_obstacle(x: object, state: FusedState, sites: list[Site]) -> str:
    """Why this input of a block needs the stock forward; empty if not. Only who reads it can tell its channels."""
    for call, site in zip(state.program.chains, sites, strict=True):
        if call.input == state.program.input:
            return input_obstacle(x, site)
    return input_obstacle(x, sites[0], channels=False)


def run_block(block: nn.Module, x: Tensor, stock: Callable[[Tensor], Tensor]) -> Tensor:
    """A fused block's output: its program's, or that of its stock forward."""
    if as_stock.is_known(block, x):
        return stock(x)
    found = runnable(block)
    if found is None or entry_obstacle(x, *found):
        return stock(x)
    before = as_stock.fused_so_far()
    out = left(run_program(block, *found, x))
    as_stock.note(block, found[1], x, before)
    return out


class FusedModule(swap.Swapped):
    """Mixin in front of a stock class: its forward runs the program, or the stock forward where it must."""

    _resnet_fused_code: str  # fingerprint of the stock forward
    _resnet_fused_reader: Callable[[], tuple | None]  # of the globals that the stock forward reads

    def forward(self, x):
        return run_block(self, x, super().forward)


def fused_class(stock_class: type) -> type:
    """The fused subclass of `stock_class`; carries its name, so that ``repr`` and logs stay readable."""
    cls = swap.subclass(FusedModule, stock_class, (fused_class, (stock_class,)))
    cls._resnet_fused_code = fingerprint(stock_class.forward)
    cls._resnet_fused_reader = staticmethod(globals_reader(stock_class.forward))
    return cls
