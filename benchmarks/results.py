"""List the recorded runs, or print one.

python benchmarks/results.py                        # every machine's
python benchmarks/results.py epyc-zen5-2core        # one machine's
python benchmarks/results.py epyc-zen5-2core 3      # all that line 3 of its file says
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from resnet_fused.bench import runs
from resnet_fused.bench.peers import OURS
from resnet_fused.bench.records import Report

RESULTS = pathlib.Path(__file__).parent / "results"


def gist(run: runs.Run) -> str:
    """A run in a few words."""
    if not isinstance(run.result, Report):
        return run.provenance.get("command", "")
    ours = next((row for row in run.result.rows if row.peer == OURS and row.unit == "ms"), None)
    found = f"{run.provenance['model']} {run.provenance['dtype']}"
    return f"{found}, {ours.name}: {ours.median:.0f} ms, {ours.ratio:.2f}x" if ours else found


def table(found: list[runs.Run]) -> str:
    """A line for every run."""
    lines = [["machine", "line", "date", "kind", "git", "what"], ["---", "---:", "---", "---", "---", "---"]]
    for run in found:
        date = run.provenance["date"].removesuffix("+00:00")
        lines.append([run.machine, str(run.number), date, run.kind, run.provenance["git"], gist(run)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", nargs="?", help="a folder in benchmarks/results; default: all of them")
    parser.add_argument("line", nargs="?", type=int, help="of the machine's file, from 1")
    options = parser.parse_args()
    try:
        found = runs.read(RESULTS, options.machine)
    except ValueError as error:
        parser.error(str(error))
    if options.line is None:
        print(table(found))
    elif 1 <= options.line <= len(found):
        print(found[options.line - 1].markdown())
    else:
        parser.error(f"{options.machine} has no line {options.line}; it has {len(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
