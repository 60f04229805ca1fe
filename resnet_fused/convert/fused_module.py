"""A stock module whose class was swapped for a subclass that runs its programs.

Swapping the class leaves everything a user can hold on to as it was: the object, its children, parameters, hooks,
``state_dict`` and ``isinstance``. The stock forward stays one ``super()`` away, and is what runs wherever a call cannot
be fused.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends import current
from ..blocks import dense, drop_paths, proven, runtime
from ..blocks.by_modules import called
from ..blocks.layers import hooked, hooked_within, why_not_passed
from ..blocks.site import CHANGED, Site, find, module_obstacle, sites_in, value_obstacle
from ..steps.gate import Gated
from ..steps.layout import Placed, arrived, left
from . import as_stock, forced, gates, swap
from .dropouts import TRAINING, are_quiet
from .instructions import OUTDATED, Form, GateCall, GatedSum, Ref, ShapeCall, StockCall, resolve
from .opened import obstacle
from .order import module_effect
from .outside import Outside, globals_reader
from .swap import STATE
from .trace import fingerprint, value_of


@dataclasses.dataclass
class FusedState:
    """What a fused module carries; plain data, so that it copies and pickles."""

    forms: tuple[Form, ...]  # the first whose dropouts are quiet runs
    traced: tuple  # what the forward reads of the block, see trace.state_of
    code: str  # of the forward that was traced, see trace.fingerprint
    backend: str
    outside: Outside  # what the forward reads outside of the block
    precision: str = "default"
    drop_path: str = "all"  # which samples a branch with a drop path runs on, see blocks.survivors
    prefer: str = "speed"  # or "memory"
    reasons: tuple[str, ...] = ()  # why parts of the block stayed stock

    def __post_init__(self) -> None:
        if self.drop_path == "survivors":
            _leave_graphs()

    def __setstate__(self, state: dict) -> None:
        if state.keys() != {field.name for field in dataclasses.fields(self)}:
            raise pickle.UnpicklingError(OUTDATED)
        self.__dict__.update(state)
        self.__post_init__()


class Running(NamedTuple):
    """A form of a block and the modules of its programs."""

    block: nn.Module
    form: Form
    sites: list[Site]


def _form_obstacle(block: nn.Module, form: Form, sites: list[Site] | None) -> str:
    """Why the modules of a form must be called one by one now; empty if they need not."""
    if sites is None:
        missing = next(name for name in form.modules if find(block, name) is None)
        return f"{missing} was removed after fuse(); call fuse() again"
    for name, length in form.containers:
        container = find(block, name)
        if type(container) is not nn.Sequential or len(container) != length or why_not_passed(container):
            return f"{name} {CHANGED}"
        if hooked(container):
            return f"hooks on {name}"
    for opened in form.opened:
        if reason := obstacle(find(block, opened.name), opened):
            return reason
    for name, kind, effect in form.between:
        module = find(block, name)
        if type(module).__name__ != kind or module_effect(module) != effect:
            return f"{name} {CHANGED}"
        if hooked_within(module):
            return f"hooks on or in {name}, which is called within a program"
    for site in sites:
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
    for name, value in state.traced:  # noqa: SIM110  a loop is half the time of all()
        if value_of(block, name) != value:
            return False
    return True


def choose(block: nn.Module, state: FusedState) -> tuple[Running | None, str]:
    """What `block` can run fused now; None, and why, where it is nothing."""
    if not runs_as_traced(block, state):
        return None, "its forward, or what it reads, was changed after fuse(); call fuse() again"
    form = next((form for form in state.forms if are_quiet(block, form.quiet)), None)
    if form is None:
        return None, "a dropout that draws, around which nothing is fused"
    if form.shapes[0].program.dense and (reason := dense.obstacle(block, swap.stock_class(block), form.shapes[0])):
        return None, reason
    sites = sites_in(block, form.shapes, state.backend, form.modules, state.precision, state.drop_path == "survivors")
    reason = _form_obstacle(block, form, sites)
    return None if reason else Running(block, form, sites), reason


def runnable(block: nn.Module) -> Running | None:
    """What `block` runs fused now, if its input allows; None where it runs its stock forward."""
    state: FusedState | None = block.__dict__.get(STATE)
    if state is None or forced.is_stock_forced():
        return None
    return choose(block, state)[0]


def entry_obstacle(x: object, running: Running) -> str:
    """Why this input of a block needs the stock forward; empty if not. Only who reads it can tell its channels."""
    first, sites = running.form.first, running.sites
    return value_obstacle(x, sites[first or 0], channels=first is not None)


def _run_stock(block: nn.Module, call: StockCall, values: dict[str, object]) -> object:
    if call.op == "call_module" and call.takes_one:  # whose own blocks take values as they are
        child = block.get_submodule(call.target)
        if is_entered(child):
            return run_block(child, values[call.args[0].name], child)
    args = [resolve(arg, values) for arg in call.args]
    kwargs = {key: resolve(arg, values) for key, arg in call.kwargs}
    if call.op == "call_module":
        return block.get_submodule(call.target)(*args, **kwargs)
    if call.op == "call_method":
        return getattr(args[0], call.target)(*args[1:], **kwargs)
    return call.target(*args, **kwargs)


def run_form(running: Running, x: Tensor | Placed) -> object:
    """The block's output: of its programs fused, and of everything between them stock.

    What is called in between gets values in stock's layout.
    """
    block, form, sites = running
    if form.is_whole:
        out = runtime.run_site(sites[0], placed(x), just_asked=True)
        return swap.stock_class(block).forward(block, left(x)) if out is None else out
    values, remaining = {form.input: _as_others_see(x), TRAINING: block.training}, iter(sites)
    for call in form.calls:
        if isinstance(call, StockCall):
            made = _run_stock(block, call, values)
        elif isinstance(call, GateCall):
            made = _run_gate(block, call, sites[0].backend, values)
        elif isinstance(call, GatedSum):
            made = _run_sum(block, call, values)
        else:
            made = _run_shape(call, next(remaining), values)
        values[call.output] = made if call.output in form.passed else _as_others_see(made)
    result = form.result
    return values[result.name] if isinstance(result, Ref) else resolve(result, values)


def _run_gate(block: nn.Module, call: GateCall, backend: str, values: dict[str, object]) -> object:
    backend = backend if current() == "auto" else current()
    out = gates.run(block, call, values[call.input], backend, _run_stock)
    if out is None:
        return _run_stock(block, call.stock, values)
    runtime.count_fused()
    return out


def _run_sum(block: nn.Module, call: GatedSum, values: dict[str, object]) -> object:
    gated, other = call.inputs
    out = gates.run_sum(block, call, values[gated], values[other])
    if out is None:
        if isinstance(values[gated], Gated):
            values[gated] = values[gated].written()
        for stock in call.stock:
            out = values[stock.output] = _run_stock(block, stock, values)
    return out


def _run_shape(call: ShapeCall, site: Site, values: dict[str, object]) -> object:
    """A program between stock calls, which may have made anything; by its modules where it does not gain."""
    h, *others = (placed(values[name]) for name in call.inputs)
    residual = others[0].value if others else None
    if value_obstacle(h.value, site):
        runtime.count_hindered()
        out = None
    else:
        out = runtime.run_site(site, h, residual)
    if out is None:
        return called(site, *(resolve(Ref(name), values) for name in call.inputs))
    return out


def _as_others_see(value: object) -> object:
    """A value that stock calls may write to: nothing is known of it afterwards."""
    if not isinstance(value, Placed):
        return value
    return value._replace(moments=None, owned=False, into=None, source=None)


def placed(value: Tensor | Placed) -> Placed:
    """A value as programs take it."""
    return value if isinstance(value, Placed) else arrived(value)


def run_block(block: nn.Module, x: object, stock: Callable[[Tensor], Tensor], running: Running | None = None) -> object:
    """A fused block's output for another: its form's, or that of `stock`, its forward or itself.

    `running`: what it runs, if that was just found.
    """
    if torch.jit.is_tracing():  # before anything reads a parameter, which would be recorded
        return stock(left(x))
    if torch.compiler.is_compiling() and _on_survivors(block):
        return _outside_graphs(block, x, stock, running)
    value = x.value if isinstance(x, Placed) else x
    plain = value is x or x.channels_last or value.is_contiguous()  # stock takes it as it lies, without a copy
    if plain and as_stock.is_known(block, value):
        return as_stock.run(stock, value)
    running = runnable(block) if running is None else running
    if running is None or entry_obstacle(value, running):
        runtime.count_hindered()
        return stock(left(x))
    before = as_stock.so_far()
    out = run_form(running, x)
    if plain:
        as_stock.note(block, running.sites, value, before)
    return out


def _on_survivors(block: nn.Module) -> bool:
    """Whether how many samples a block's branch runs on now is known at the call only."""
    if getattr(block.__dict__.get(STATE), "drop_path", "all") != "survivors":
        return False
    return any(drop_paths.is_one(module) and drop_paths.draws(module) for module in block.modules())


#: :func:`run_block` for a block between two graphs: how many samples survive decides what runs.
_outside_graphs: Callable | None = None


def _leave_graphs() -> None:
    """Make that function, once a block may need it: PyTorch imports its compiler for it."""
    global _outside_graphs
    if _outside_graphs is None:
        _outside_graphs = torch.compiler.disable(run_block)


class FusedModule(swap.Swapped):
    """Mixin in front of a stock class: its forward runs its programs, or the stock forward where it must."""

    _resnet_fused_code: str  # fingerprint of the stock forward
    _resnet_fused_reader: Callable[[], tuple | None]  # of the globals that the stock forward reads

    def forward(self, x):
        if as_stock.is_within():
            return super().forward(x)
        return left(run_block(self, x, super().forward))


def is_entered(block: nn.Module) -> bool:
    """Whether calling `block` is nothing but running its fused forward, so that who holds it may do that itself."""
    if not isinstance(block, FusedModule) or hooked(block) or block._compiled_call_impl is not None:
        return False
    if any(name in block.__dict__ for name in ("forward", *proven.CALL)):
        return False
    cls = type(block)
    if torch.compiler.is_compiling():
        return True
    own = cls.forward is vars(cls._resnet_fused_class)["forward"]
    return own and all(getattr(cls, name) is getattr(nn.Module, name) for name in proven.CALL)


def fused_class(stock_class: type) -> type:
    """The fused subclass of `stock_class`; carries its name, so that ``repr`` and logs stay readable."""
    cls = swap.subclass(FusedModule, stock_class, (fused_class, (stock_class,)))
    cls._resnet_fused_code = fingerprint(stock_class.forward)
    cls._resnet_fused_reader = staticmethod(globals_reader(stock_class.forward))
    return cls
