"""``bench``: prove that fused equals stock, then time both."""

from __future__ import annotations

import argparse
import sys

from ..bench import plots, runs
from ..bench.options import Options
from ..bench.run import Disagreement
from ..bench.run import run as run_bench


def run(options: argparse.Namespace) -> int:
    """Print the table, write the files asked for; 1 where fused and stock disagree."""
    names = ("model", "batch", "size", "dtype", "device", "quick", "fresh")
    try:
        report = run_bench(Options(peers=tuple(options.peers), **{name: getattr(options, name) for name in names}))
    except Disagreement as error:
        print(f"resnet-fused bench: {error}", file=sys.stderr)
        return 1
    print(report.markdown())
    if options.record:
        runs.record(options.record, report)
    if options.json:
        options.json.write_text(report.to_json())
    if options.plot:
        plots.plot(report, options.plot)
    return 0
