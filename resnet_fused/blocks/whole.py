"""Run a block that is one program, at call time: what :mod:`.program_site` has found no obstacle for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..backends import bounds, current
from ..plan.lower import decided_by, lower
from ..steps.layout import Placed, behind
from ..steps.program_node import Lowered, run_program
from ..steps.saved import refuses_inference_tensors
from ..steps.spec import StepTensors
from . import program_site
from .program_site import ProgramSite
from .runtime import count_fused

Tensor = torch.Tensor
KEPT = 64  # ways to run one block that are kept: image sizes, dtypes, settings


def takes(site: ProgramSite, x: Tensor) -> bool:
    """Whether this call is a program's: one that trains, on plain tensors, with batch statistics throughout.

    Evaluation folds batch norm into convolutions where it can, which chains do; a graph is compiled from them too.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype != torch.get_autocast_dtype(x.device.type):
        return False  # the identity path keeps the wider dtype in stock
    if program_site.obstacle(site) or not program_site.normalises_with_batch(site):
        return False
    weight = next(module.weight for module in site.modules if isinstance(module, nn.Conv2d))
    fits = x.dtype == weight.dtype or (autocast and weight.dtype != torch.float64)
    return fits and x.shape[1] == program_site.channels_of(site)


def run_whole(site: ProgramSite, x: Placed, draw: Callable[[], Tensor | None]) -> Placed | None:
    """The output of `site` on `x`, in whatever layout suits the program; None: stock's operations are to run.

    `draw`: draws the per-sample factor of the program's drop path, once it is certain that it runs.
    """
    dtype, tensors = None, program_site.tensors_of(site)
    if torch.is_autocast_enabled(x.value.device.type):
        dtype = torch.get_autocast_dtype(x.value.device.type)
    lowered = None if refuses_inference_tensors(tensors) else _lowered(site, x.value, tensors)
    if lowered is None:
        return None
    count_fused()
    with torch.autocast(x.value.device.type, enabled=False), bounds.private():
        out = run_program(lowered, x.value, [own.cast(dtype) for own in tensors], draw())
    weights = [site.modules[node].weight for node in lowered.program.main_convolutions]
    return behind(out, x, weights, lowered.program.nodes[-1].relu)


def _lowered(site: ProgramSite, x: Tensor, tensors: list[StepTensors]) -> Lowered | None:
    """How `site` runs on `x`, decided once for all that it depends on; None: as stock."""
    backend = site.backend if current() == "auto" else current()
    settings, decided = program_site.settings_of(site), decided_by(x)
    key = backend, settings, decided, *(own.weight.shape for own in tensors if own.weight is not None)
    if decided is None:
        return lower(program_site.program_of(site, settings, backend), x, tensors)
    found = site.kept.get(key, key)  # a key is no answer
    if found is key:
        if len(site.kept) >= KEPT:
            site.kept.clear()
        site.kept[key] = found = lower(program_site.program_of(site, settings, backend), x, tensors)
    return found
