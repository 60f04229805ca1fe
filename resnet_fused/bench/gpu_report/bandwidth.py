"""Every distinct call of our ops in a model: its values against float64, and its bandwidth beside a device copy's.

The calls with most to do come first. Inputs are random, on a grid where no sign is in doubt. A prediction is the cost
model's, with the kernel's own bytes and FLOPs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from ...backends import Backend, backends
from ...backends.selfcheck import allowed_error, difference, results
from ...blocks import devices
from . import measure
from .calls import Call, calls_of, changed, widened
from .context import Context

QUICK_CALLS = 8  # of each model and mode
REFERENCE_COPIES = 6  # float64 tensors of the size of all arguments that the reference may hold at once


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
    arguments = call.without_values()
    bytes, flops = call.contract.bytes(*arguments), call.contract.flops(*arguments)
    return devices.of(context.device).seconds(bytes, flops, context.settings.dtype)


def ordered(context: Context, calls: dict[Call, int]) -> list[Call]:
    """Those with most to do in the whole model first."""
    return sorted(calls, key=lambda call: -expected(context, call) * calls[call])


def takers(context: Context, call: Call) -> list[Backend]:
    """The backends with a kernel of their own for `call`: all of them on a GPU, the first on a CPU; else PyTorch's."""
    kinds = [b for b in backends().values() if context.device.type in b.devices and call.op in b.kernels]
    own = [b for b in kinds if b.name != "reference" and not b.unavailable]
    return (own if context.on_gpu else own[:1]) or [backends()["reference"]]


def row_of_call(context: Context, backend: Backend, call: Call, count: int, where: str, found: dict) -> None:
    """Check one call, time it, write its row."""
    generator = torch.Generator(context.device).manual_seed(0)
    arguments = call.drawn(generator)
    fields = {"name": call.op, "backend": backend.name, "case": call.label, "used": count, "by": where}
    fields["dtype"] = str(arguments[0].dtype).removeprefix("torch.")
    if reasons := backend.reasons(call.op, arguments, {}):
        context.skip("; ".join(reasons), **fields)
        return
    kernel = backend.kernels[call.op].run
    matched = match(context, call, kernel, arguments)
    bytes, flops = call.contract.bytes(*arguments), call.contract.flops(*arguments)
    sets = [arguments]
    sets += [call.drawn(generator) for _ in range(measure.number_of_sets(bytes, context.device) - 1)]
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
    size = sum(8 * t.numel() for t in arguments if isinstance(t, torch.Tensor))
    if context.on_gpu and REFERENCE_COPIES * size > torch.cuda.mem_get_info(context.device)[0]:
        return {"reason": "float64 would not fit into memory"}
    own, wide = changed(arguments, torch.clone), changed(arguments, widened)
    got = results(kernel(*own), own)
    exact = results(call.contract.reference(*wide), wide)
    pairs = []
    for g, e in zip(got, exact, strict=True):
        bits = g.dtype == torch.uint8
        pairs.append((difference(g, e.cpu()), 0.0 if bits else allowed_error(call.op, arguments[0].dtype, g)))
    pairs = [pair for pair, g in zip(pairs, got, strict=True) if g.numel()]
    if not pairs:
        return {"reason": "it returns nothing"}
    wrong = [pair for pair in pairs if not pair[0] <= pair[1]]
    error, allowed = (wrong or [max(pairs, key=lambda pair: (pair[0] / (pair[1] or 1.0), pair[1]))])[0]
    return {"error": error, "allowed": allowed, "agrees": not wrong}
