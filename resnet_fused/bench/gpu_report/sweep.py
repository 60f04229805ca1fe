"""Other tiles for the products of a training step: those that are right and faster go into the table of tuned ones.

The calls with most time in the model come first. Of each, the tile in use is varied along one axis at a time, and then
along two of those that won. A row holds every candidate, also those that did not compile. What beats the tile in use by
more than the noise becomes a line of `tuned`, keyed as ``backends.triton.configs.TUNED`` is: copy it there, with the
report's file in ``benchmarks/results/gpu/`` as its provenance.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from ...backends import backends
from ...traffic.calls import Call
from . import bandwidth, measure
from .calls import calls_of, drawn
from .context import Context

#: A candidate must be faster by so much, and its slow decile by as much as the other's median.
WORTH = 0.98
QUICK_CALLS, QUICK_CANDIDATES = 2, 2
AXES = ("block_m", "block_n", "block_k")


def obstacle(context: Context) -> str:
    """Why there is nothing to sweep here."""
    triton = backends()["triton"]
    if triton.unavailable:
        return triton.unavailable
    return "" if context.on_gpu else "tiles are for GPUs; the interpreter's times say nothing of them"


def table() -> ModuleType:
    """Where configurations come from; importing it imports Triton."""
    return importlib.import_module("...backends.triton.configs", __package__)


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each product of the first model's training step."""
    if reason := obstacle(context):
        yield "all", lambda: context.skip(reason)
        return
    tiled = {launch.split()[0] for launch in table().DEFAULTS}
    name, done = context.settings.models[0], set()
    found = calls_of(context, name, True)
    products = [call for call in bandwidth.ordered(context, found) if call.op in tiled]
    for call in products[: QUICK_CALLS if context.settings.quick else None]:
        yield f"{name} {call.op} {call.label}", functools.partial(sweep, context, call, found[call], done)


def sweep(context: Context, call: Call, used: int, done: set) -> None:
    """Vary every tile that `call` asks for, once in the whole part."""
    generator = torch.Generator(context.device).manual_seed(0)
    sets = [drawn(call, generator)]
    size = call.contract.bytes(*sets[0])
    sets += [drawn(call, generator) for _ in range(measure.number_of_sets(size, context.device) - 1)]
    kernel = backends()["triton"].kernels[call.op].run
    with table().asked() as found:
        base = measure_call(context, call, kernel, sets)
    for key, chosen in found.items():
        if key in done:
            continue
        done.add(key)
        fields = {"name": call.op, "case": call.label, "used": used, "key": list(key)}
        context.row(config=dataclasses.asdict(chosen), in_use=True, **fields, **base)
        tried = {chosen: base}
        for candidate in candidates(context, chosen):
            attempt(context, call, kernel, sets, key, candidate, tried, fields)
        better = {config for config, row in tried.items() if row["ms"] < base["ms"] * WORTH}
        for candidate in combined(chosen, better) - tried.keys():
            attempt(context, call, kernel, sets, key, candidate, tried, fields)
        keep(context, key, chosen, tried, call)


def attempt(context: Context, call: Call, kernel, sets, key, candidate, tried: dict, fields: dict) -> None:
    """Check and time one candidate while there is time."""
    if context.left() <= 0:
        return

    def one() -> None:
        with table().trying(key, candidate):
            row = measure_call(context, call, kernel, sets)
        status = "measured" if row["match"].get("agrees", True) else "error"
        context.row(status, config=dataclasses.asdict(candidate), **fields, **row)
        if status == "measured":
            tried[candidate] = row

    context.attempt(one, config=dataclasses.asdict(candidate), **fields)


def measure_call(context: Context, call: Call, kernel, sets: list[tuple]) -> dict[str, object]:
    """Whether the values are right, and the time."""
    matched = bandwidth.match(context, call, kernel, sets[0])
    calls = [functools.partial(kernel, *arguments) for arguments in sets]
    return measure.time_calls(calls, context.device, context.settings.quick).row() | {"match": matched}


def candidates(context: Context, chosen) -> list:
    """Neighbours of a tile: half and twice each side, the other number of warps, a stage more and less."""
    found = []
    for axis in AXES:
        value = getattr(chosen, axis)
        found += [dataclasses.replace(chosen, **{axis: other}) for other in (value // 2, 2 * value) if other >= 16]
    found += [dataclasses.replace(chosen, warps=other) for other in {4, 8} - {chosen.warps}]
    found += [dataclasses.replace(chosen, stages=chosen.stages + step) for step in (1, -1) if chosen.stages + step > 0]
    if chosen.registers is not None:
        found.append(dataclasses.replace(chosen, registers=None))
    return found[:QUICK_CANDIDATES] if context.settings.quick else found


def combined(chosen, better: set) -> set:
    """Two changes that won, made together."""
    names = [field.name for field in dataclasses.fields(chosen)]
    changes = [{n: getattr(b, n) for n in names if getattr(b, n) != getattr(chosen, n)} for b in better]
    pairs = [one | other for i, one in enumerate(changes) for other in changes[:i] if not one.keys() & other.keys()]
    return {dataclasses.replace(chosen, **pair) for pair in pairs}


def keep(context: Context, key, chosen, tried: dict, call: Call) -> None:
    """A line for the table of tuned configurations, where one clearly won."""
    best = min(tried, key=lambda config: tried[config]["ms"])
    base, found = tried[chosen], tried[best]
    if best == chosen or found["ms"] >= WORTH * base["ms"] or found["q90"] >= base["ms"]:
        return
    names = ("op", "capability", "element_size", "columns", "depth")
    line = dict(zip(names, key, strict=True)) | {
        "config": dataclasses.asdict(best),
        "in_use": dataclasses.asdict(chosen),
    }
    context.stream.write("tuned", **line, ms=found["ms"], ms_in_use=base["ms"], case=call.label)
