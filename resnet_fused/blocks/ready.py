"""Calls of a form that was met before, of modules that are unchanged: everything is decided, only tensors are read.

A form holds all else that decides how a call runs: what it is given, as far as that is not values, PyTorch's settings,
the plan's, and the memory that the modules' tensors lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import bounds, dispatch, met, tape
from ..ops import stat_dtype
from ..plan import choose, measured
from ..steps import StepTensors
from ..steps.directions import Lowered
from ..steps.flow import Handed
from ..steps.layout import Placed, is_pointwise, lies, suggests_channels_last
from ..steps.program import Call, Program
from ..steps.program_node import ALIGNED, RepeatedProgram, run_flat
from ..steps.spec import Places, flatten, present, regroup, spread
from . import drop_paths
from .kept_evaluation import Way, way_of
from .site import Site
from .unchanged import is_wrapper


class Folding(NamedTuple):
    """How steps that are made from parameters run: the places of the call's tensors among those that there are."""

    way: Way
    program: Program
    places: Places


class Ready(NamedTuple):
    """How all calls of one form run."""

    run: Callable[[Tensor, Tensor | None, list[Tensor], Handed, Tensor | None], Tensor | None]
    slots: list[tuple[dict, str]]  # where the tensors of all nodes are to be looked up
    cast: tuple[int, ...]  # which of these autocast casts
    dtype: torch.dtype | None  # to which
    clamped: bool
    like_weights: bool  # a weight on the main branch is in channels_last
    pointwise: bool
    repeated: tape.Repeated | None = None  # what repeats it, in evaluation that folds nothing
    folding: Folding | None = None  # in one that folds, and keeps what it made

    def __call__(self, x: Placed, residual: Tensor | None, factor: Tensor | None) -> Placed | None:
        """What leaves; None where values decide that stock's operations run."""
        value, dtype = x.value, self.dtype
        tensors = [inner[name] for inner, name in self.slots]
        passed = residual is None and dtype in (None, value.dtype)
        handed = Handed(x.moments, x.owned, x.into) if passed else Handed()
        if dtype is None:
            out = self.run(value, residual, tensors, handed, factor)
        else:
            torch.set_autocast_enabled(value.device.type, False)
            try:
                for i in self.cast:
                    tensors[i] = tensors[i].to(dtype)
                out = self.run(value.to(dtype), residual, tensors, handed, factor)
            finally:
                torch.set_autocast_enabled(value.device.type, True)
        if out is None:
            return None
        in_channels_last = lies(out, x.channels_last or self.like_weights, self.pointwise)
        moments = handed.leaving if passed else None
        owned = passed and not out.requires_grad
        return Placed(out, in_channels_last, self.clamped, moments, owned, source=handed.source)


def form_of(site: Site, x: Placed, residual: Tensor | None, just_asked: bool) -> tuple | None:
    """The form of a call; None where each must find out how it runs. `just_asked`: the modules are unchanged."""
    if torch.compiler.is_compiling() or site.kept is None:
        return None
    known, value = site.kept.unchanged, x.value
    if not known or not (just_asked or (known.settings_hold() and known.facts_hold())):
        return None
    if met.is_seen() or choose.observers or choose.tuner() is not None or is_wrapper(value):
        return None
    device = value.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    own = None if residual is None else (residual is value, is_wrapper(residual), *facts(residual))
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
    settings = choose.target(), choose.fuses_all(), measured.changes(), site.backend, site.precision, *dispatch.state()
    draws = drop_paths.draws(site.drop_path)
    return *facts(value), x.moments is None, own, draws, *modes, *settings, *known.memory()


def facts(t: Tensor) -> tuple:
    return type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.data_ptr() % ALIGNED


def keep_training(site: Site, form: tuple, call: Call, lowered: Lowered, dtype: torch.dtype | None) -> RepeatedProgram:
    """Keep that calls of this form are run as `lowered`; returns what is kept of them. `call`: as modules have it."""
    _, places = present(flatten(call.tensors))
    weights = [call.tensors[node].weight for node in lowered.program.main_convolutions]
    in_channels_last, repeated = any(map(suggests_channels_last, [call.x, *weights])), RepeatedProgram()

    def run(x: Tensor, residual: Tensor | None, tensors: list[Tensor], handed: Handed, factor: Tensor | None) -> Tensor:
        with bounds.private():
            factor = None if factor is None else factor.to(stat_dtype(x.dtype))
            options = handed if residual is None else None, factor, x, residual, tensors, places, in_channels_last
            return run_flat(lowered, repeated, *options)

    _keep(site, form, call, dtype, dtype is not None, run)
    return repeated


def keep_evaluation(site: Site, form: tuple, call: Call, dtype: torch.dtype | None) -> None:
    """The same of evaluation. Where something is folded, each call compares what it was made from, and may measure."""
    way, program, repeated = way_of(call, site.modules, dtype), call.program, tape.Repeated()
    repeats = not way.folds and (way.last is not None or choose.on_gpu(call.x))
    _, places = present(flatten(call.tensors))

    def evaluated(x: Tensor, residual: Tensor | None, tensors: Sequence[Tensor], handed: Handed) -> Tensor | None:
        return way(Call(program, x, regroup(spread(tensors, places)), residual), handed)

    def once(x: Tensor, residual: Tensor | None, *tensors: Tensor) -> tuple[list[Tensor], None]:
        return [evaluated(x, residual, tensors, Handed())], None

    def run(x: Tensor, residual: Tensor | None, tensors: list[Tensor], handed: Handed, _: None) -> Tensor | None:
        with torch.no_grad():
            if repeats:
                return repeated(once, (x, residual, *tensors))[0][0]
            return evaluated(x, residual, tensors, handed)

    casts = dtype is not None and not way.folds  # which casts what is folded
    folding = Folding(way, program, places) if way.folds and way.last is not None else None
    _keep(site, form, call, dtype, casts, run, repeated if repeats else None, folding)


def _keep(
    site: Site,
    form: tuple,
    call: Call,
    dtype: torch.dtype | None,
    casts: bool,
    run: Callable,
    repeated: tape.Repeated | None = None,
    folding: Folding | None = None,
) -> None:
    tensors, places = present(flatten(call.tensors))
    width = len(StepTensors._fields)
    cast = [place for i, place in enumerate(places) if casts and place is not None and i % width < 2]
    like_weights = any(suggests_channels_last(call.tensors[node].weight) for node in call.program.main_convolutions)
    known = site.kept.unchanged
    slots = known.slots(tensors) if known else None
    if slots is None:
        return  # as another thread has exchanged one meanwhile
    layout = (call.program.clamped, like_weights, is_pointwise(call.program))
    known.ready[form] = Ready(run, slots, tuple(cast), dtype, *layout, repeated, folding)
