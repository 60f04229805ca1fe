"""``explain``: the plan of a model, without running it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json

import resnet_fused

from ..bench import named
from ..bench.errors import Refused
from ..bench.options import DTYPES, device_of
from ..plan import devices
from ..traffic.explain import Comparison, Explanation
from . import BATCH


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    if options.input and (options.batch or options.size):
        raise Refused("--input names batch and size too; pass it, or --batch and --size")
    target = planned_for(options.device)
    model = named.build(options.model)
    edge = options.size or named.input_size(model)
    size = options.input or (options.batch or BATCH, 3, edge, edge)
    named.require_taken(model.train(not options.eval), size)
    explained = resnet_fused.explain(model, size, dtype=DTYPES[options.dtype], training=not options.eval, device=target)
    print(explained)
    if options.json:
        options.json.write_text(json.dumps(figures(explained), indent=1) + "\n")
    return 0


def planned_for(name: str) -> devices.Device | None:
    """The device called `name`: a known GPU, or one of this machine; None is the CPU.

    Raises:
        Refused: it is neither.
    """
    with contextlib.suppress(ValueError):
        return devices.find(name)
    device = device_of(name, tuple(devices.DEVICES))
    return None if device.type == "cpu" else devices.of(device)


def figures(explained: Explanation) -> dict:
    """What is printed, as plain data; bytes and FLOPs of the whole batch."""
    return {
        "training": explained.training,
        "device": explained.device.name if explained.device else "cpu",
        "blocks": [compared(block) for block in explained.blocks],
        "model": compared(explained.model),
        "left": list(explained.left),
        "predicted_seconds": {
            row.device.name: {side: dataclasses.asdict(getattr(row, side)) for side in ("fused", "stock", "compiled")}
            for row in explained.predictions
        },
    }


def compared(entry: Comparison) -> dict:
    """One block or model."""
    sides = {"fused": entry.fused, "stock": entry.stock, "compiled": entry.compiled}
    counted = {
        name: {"bytes": side.bytes, "flops": side.flops, "launches": side.launches} for name, side in sides.items()
    }
    saved = {"fused": entry.fused_saved, "stock": entry.stock_saved}
    return {"name": entry.name, "input": list(entry.shape), "plan": entry.plan, **counted, "saved_bytes": saved}
