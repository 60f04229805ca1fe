"""``gpu-report``: everything worth knowing about the kernels on a GPU, in one file that can be sent."""

from __future__ import annotations

import argparse

import torch

from ..bench import named
from ..bench.errors import Refused
from ..bench.gpu_report import runner, tables
from ..bench.gpu_report.context import MODELS, Settings, batch_for
from ..bench.gpu_report.parts import BY_NAME, PARTS
from ..bench.gpu_report.stream import Document
from ..bench.options import device_of


def run(options: argparse.Namespace) -> int:
    """Run the parts, write the file, print the tables; 1 where a self-check, a contract or a value failed."""
    settings = settings_of(options)
    chosen = [part for part in PARTS if part.name in (options.parts or BY_NAME)]
    out = options.out.resolve()
    code = 0
    try:
        document = runner.run(chosen, settings, 60 * options.minutes, out)
    except KeyboardInterrupt as error:
        document, code = Document.from_file(out), 143 if isinstance(error, runner.Terminated) else 130
    print(tables.summary(document))
    failed = len(document.failures())
    print(f"\n{len(document.rows)} rows in {options.out}: " + (f"{failed} FAILED" if failed else "nothing failed"))
    return code or (1 if failed else 0)


def settings_of(options: argparse.Namespace) -> Settings:
    """The options with every default decided.

    Raises:
        Refused: a part, a model or the device does not exist.
    """
    unknown = [name for name in options.parts or () if name not in BY_NAME]
    if unknown:
        raise Refused(f"unknown part {unknown[0]!r}; pass some of {', '.join(BY_NAME)}")
    for name in options.models or ():
        named.build(name)
    device = device_of(options.device)
    models = tuple(options.models or (MODELS[:1] if options.quick or device.type == "cpu" else MODELS))
    if device.type == "cpu" or options.quick:
        return Settings(str(device), models, options.batch or 2, 64, options.quick)
    torch.cuda.init()
    return Settings(str(device), models, options.batch or batch_for(device), 224)
