"""``tune``: measure the variants of every block of a model on this machine, and keep the fastest for later."""

from __future__ import annotations

import argparse
import sys

import torch

import resnet_fused

from ..bench import named, records
from ..bench.options import autocast_dtype, device_of
from ..bench.peers import fused
from ..plan import choose
from . import BATCH


def run(options: argparse.Namespace) -> int:
    """Print the report; each choice goes to stderr as it is made."""
    device = device_of(options.device)
    torch.manual_seed(0)
    model = named.build(options.model)
    size = options.size or named.input_size(model)
    named.require_taken(model.train(), (options.batch or BATCH, 3, size, size))
    model = fused.prepare(model).to(device, memory_format=torch.channels_last)
    x = torch.randn(options.batch or BATCH, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    if records.busy():
        _say(records.busy())
    dtype = autocast_dtype(options.dtype)
    choose.observers.append(_say)
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            tuned = resnet_fused.tune(model, x)
    finally:
        choose.observers.remove(_say)
    print(tuned)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
