"""``verify``: every kernel on this machine against float64, then fused blocks against stock ones."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import sys

import torch
from torch import nn

import resnet_fused

from .. import models
from ..backends import cards, check_all, check_call
from ..backends.selfcheck.judge import Verdict
from ..bench import equality, named, records
from ..bench.blocks import Block
from ..bench.errors import Refused
from ..bench.options import DTYPES, autocast_dtype, device_of
from ..models.stages import conv1x1
from ..plan import devices
from ..traffic.calls import calls
from ..traffic.coverage import Coverage
from . import GPU_BATCH
from .info import table

MODEL_DTYPE = "bf16"  # of a model's step where none is named


def run(options: argparse.Namespace) -> int:
    """Print a line per kernel and dtype and per block; 1 if anything failed."""
    if not options.model and (options.batch or options.size or options.eval):
        raise Refused("--batch, --size and --eval are of a model's step; name the model too")
    device = device_of(options.device)
    dtypes = [options.dtype] if options.dtype else list(DTYPES)
    verdicts = check_all(device, DTYPES.get(options.dtype))
    if options.model:
        verdicts += check_model(options, device)
    rows = kernel_rows(verdicts)
    print(table(["kernel", "dtype", "passed", "skipped", "worst error / allowed", "verdict"], rows))
    print()
    found = [difference for name, make in BLOCKS.items() for difference in check_block(name, make, device, dtypes)]
    print(table(["block", "tensors", "worst error / allowed", "verdict"], block_rows(found)))
    failures = [str(v) for v in verdicts if v.status == "failed"] + [str(d) for d in found if not d.agrees]
    if options.json:
        found_by = records.provenance(device)
        rows = [dataclasses.asdict(verdict) for verdict in verdicts]
        options.json.write_text(json.dumps({"provenance": found_by, "kernels": rows}, indent=1) + "\n")
    summary = f"{len(verdicts)} kernel cases and {len(found)} tensors of blocks on {device}"
    print(f"\n{summary}: " + ("all within their limits" if not failures else f"{len(failures)} FAILED"))
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


def check_model(options: argparse.Namespace, device: torch.device) -> list[Verdict]:
    """Every GPU kernel that a step of a model would start on `device`, in the configurations that it would start.

    Without a GPU they are those for an H100, and run in Triton's interpreter, if that is on.
    """
    model = named.build(options.model)
    size, dtype = options.size or named.input_size(model), DTYPES[options.dtype or MODEL_DTYPE]
    x = torch.empty(options.batch or GPU_BATCH, 3, size, size, dtype=dtype, device="meta")
    named.require_taken(model.train(not options.eval), x.shape)
    target = devices.of(device) if device.type == "cuda" else devices.find("h100")
    coverage, rows = Coverage(cards.of(device)), []
    found = calls(model, x, not options.eval, target)
    for number, call in enumerate(found, 1):
        if coverage.add(call):
            print(f"resnet-fused verify: call {number} of {len(found)}, {call.op}", file=sys.stderr, flush=True)
            rows += check_call(call.op, call.args, {}, device)
    print(coverage.text(options.model, device, bool(rows)))
    return rows


def kernel_rows(verdicts: list[Verdict]) -> list[list[str]]:
    """One row for every backend, op and dtype."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((f"{verdict.backend} {verdict.op}", verdict.dtype), []).append(verdict)
    rows = []
    for (kernel, dtype), group in groups.items():
        passed, skipped = sum(v.passed for v in group), sum(v.status == "skipped" for v in group)
        measured = [v for v in group if v.status != "skipped"]
        worst = max(measured, key=lambda v: v.error / v.allowed if v.allowed else 0.0, default=None)
        figures = f"{worst.error:.1e} / {worst.allowed:.1e}" if worst else ""
        failed = len(group) - passed - skipped
        verdict = f"{failed} FAILED" if failed else "ok" if passed else "not run: " + group[0].note
        rows.append([kernel, dtype, str(passed), str(skipped), figures, verdict])
    return rows


def projection(inplanes: int, outplanes: int, stride: int) -> nn.Sequential:
    """A projection shortcut."""
    return nn.Sequential(conv1x1(inplanes, outplanes, stride), nn.BatchNorm2d(outplanes))


#: Small blocks, one for each way in which blocks differ: name -> (input channels, how to make it).
BLOCKS = {
    "BasicBlock": (64, lambda: models.BasicBlock(64, 64)),
    "BasicBlock, stride 2, projection": (32, lambda: models.BasicBlock(32, 64, 2, projection(32, 64, 2))),
    "Bottleneck": (128, lambda: models.Bottleneck(128, 32)),
    "Bottleneck, stride 2, projection": (64, lambda: models.Bottleneck(64, 32, 2, projection(64, 128, 2))),
    "Bottleneck, 8 groups": (128, lambda: models.Bottleneck(128, 32, groups=8, base_width=16)),
    "Bottleneck, dilation 2": (128, lambda: models.Bottleneck(128, 32, dilation=2)),
}


def check_block(name: str, made: tuple, device: torch.device, dtypes: list[str]) -> list[equality.Difference]:
    """Compare a block with its fused self in `dtypes`: float32, and those of 16 bits under autocast."""
    channels, make = made
    torch.manual_seed(0)
    stock = make()
    equality.scatter_norms(stock)
    stock = stock.to(device, memory_format=torch.channels_last)
    fused = resnet_fused.fuse(copy.deepcopy(stock), strict=True)
    x = torch.randn(8, channels, 12, 12).relu().to(device, memory_format=torch.channels_last)
    check = functools.partial(equality.check_block, stock, fused)
    casts = {each: autocast_dtype(each) for each in dtypes}
    return [found for each, cast in casts.items() for found in check(Block(f"{name}, {each}", x), cast)]


def block_rows(found: list[equality.Difference]) -> list[list[str]]:
    """One row for every block and dtype: the tensor closest to its limit."""
    groups: dict[str, list[equality.Difference]] = {}
    for difference in found:
        groups.setdefault(difference.tensor.rpartition(": ")[0], []).append(difference)
    rows = []
    for name, group in groups.items():
        worst = max(group, key=lambda d: d.fused / d.limit)
        failed = sum(not d.agrees for d in group)
        figures = f"{worst.fused:.1e} / {worst.limit:.1e} ({worst.tensor.rpartition(': ')[2]})"
        rows.append([name, str(len(group)), figures, f"{failed} FAILED" if failed else "ok"])
    return rows
