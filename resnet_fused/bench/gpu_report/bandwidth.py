"""Every distinct call of our ops in a model: its values against float64, and its bandwidth beside a device copy's.

The calls with most to do come first. Inputs are random, on a grid where no sign is in doubt. A prediction is the cost
model's, with the kernel's own bytes and FLOPs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from ...backends import Backend, backends
from ...backends.selfcheck.compare import allowed_error, results
from ...ops.contract import pack_mask
from ...plan import devices
from ...traffic.calls import Call
from . import measure
from .calls import calls_of, changed, drawn, widened
from .context import Context

QUICK_CALLS = 8  # of each model and mode


def items(context: Context) -> Iterator[tuple[str, Callable[[], None]]]:
    """The copy, then the calls of the first model's step, its evaluation, and the other models' steps."""
    found: dict[str, float] = {}
    yield "device copy", lambda: found.update(copy=measure.copy_row(context))
    seen: set[Call] = set()
    for model, training in plans(context):
        calls = calls_of(context, model, training)
        new = [call for call in ordered(context, calls) if call not in seen]
        for call in new[: QUICK_CALLS if context.settings.quick else None]:
            seen.add(call)
            where = f"{model}, {'training' if training else 'evaluation'}"
            for backend in takers(context, call):
                run = functools.partial(row_of_call, context, backend, call, calls[call], where, found)
                yield f"{where}: {backend.name} {call.op} {call.label}", run


def plans(context: Context) -> list[tuple[str, bool]]:
    """Which models' calls to make, in which mode."""
    first, *others = context.settings.models
    return [(first, True), (first, False), *((name, True) for name in others)]


def expected(context: Context, call: Call) -> float:
    """Seconds that the cost model expects."""
    arguments = call.args
    bytes, flops = call.contract.bytes(*arguments), call.contract.flops(*arguments)
    return devices.of(context.device).seconds(bytes, flops, context.settings.dtype)


def ordered(context: Context, calls: dict[Call, int]) -> list[Call]:
    """Those with most to do in the whole model first."""
    return sorted(calls, key=lambda call: -expected(context, call) * calls[call])


def takers(context: Context, call: Call) -> list[Backend]:
    """The backends with a kernel of their own for `call`; without one, the reference in PyTorch."""
    kinds = [b for b in backends().values() if context.device.type in b.devices and call.op in b.kernels]
    others = ("reference",) if context.on_gpu else ("reference", "triton")  # interpreted, it takes seconds a call
    own = [b for b in kinds if b.name not in others and not b.unavailable]
    return own or [backends()["reference"]]


def row_of_call(context: Context, backend: Backend, call: Call, count: int, where: str, found: dict) -> None:
    """Check one call, time it, write its row."""
    generator = torch.Generator(context.device).manual_seed(0)
    arguments = drawn(call, generator)
    fields = {"name": call.op, "backend": backend.name, "case": call.label, "used": count, "by": where}
    fields["dtype"] = str(arguments[0].dtype).removeprefix("torch.")
    if reasons := backend.reasons(call.op, arguments, {}):
        context.skip("; ".join(reasons), **fields)
        return
    kernel = backend.kernels[call.op].run
    matched = match(context, call, kernel, arguments)
    bytes, flops = call.contract.bytes(*arguments), call.contract.flops(*arguments)
    sets = [arguments]
    sets += [drawn(call, generator) for _ in range(measure.number_of_sets(bytes, context.device) - 1)]
    calls = [functools.partial(kernel, *chosen) for chosen in sets]
    timing = measure.time_calls(calls, context.device, context.settings.quick)
    rate = bytes / (timing.median * 1e-3)
    if "copy" not in found:  # this process took over from one that died
        found["copy"] = measure.copy_bandwidth(context)[0]
    figures = {"bytes": bytes, "flops": flops, "gb_per_s": rate / 1e9, "share_of_copy": rate / found["copy"]}
    figures |= {"tflops": flops / (timing.median * 1e-3) / 1e12, "predicted_ms": 1e3 * expected(context, call)}
    status = "measured" if matched.get("agrees", True) else "failed"
    context.row(status, **fields, **figures, **timing.row(), sets=len(sets), match=matched)


def match(context: Context, call: Call, kernel: Callable, arguments: tuple) -> dict[str, object]:
    """Of the result furthest from float64, relative to what is allowed: both; or why nothing was compared."""
    own = changed(arguments, torch.clone)
    got = results(kernel(*own), own, call.contract)
    try:
        wide = changed(arguments, widened)
        exact = results(call.contract.reference(*wide), wide, call.contract)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"reason": "float64 does not fit into memory"}
    pairs = []
    for g, e in zip(got, exact, strict=True):
        if g.dtype == torch.uint8 and g.dim() == 2 and g.numel():
            # packed signs of the output, which near zero may differ from float64's: they must be those of this output
            e = pack_mask(~(got[0] <= 0))
        bits = g.dtype == torch.uint8
        if g.numel():
            pairs.append((distance(g, e), 0.0 if bits else allowed_error(call.op, arguments[0].dtype, g)))
    if not pairs:
        return {"reason": "it returns nothing"}
    wrong = [pair for pair in pairs if not pair[0] <= pair[1]]
    error, allowed = (wrong or [max(pairs, key=lambda pair: (pair[0] / (pair[1] or 1.0), pair[1]))])[0]
    return {"error": error, "allowed": allowed, "agrees": not wrong}


def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference relative to the largest value, on the device; NaN where either is, as inputs are finite."""
    if got.shape != exact.shape:
        return float("inf")
    exact = exact.double()
    scale = exact.abs().max().item() or 1.0
    return (got.double() - exact).abs().max().item() / scale
