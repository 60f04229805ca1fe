"""Write the tables of README.md from what they are about: recorded results, and the backends' declarations.

Run:  python benchmarks/readme_tables.py [--check]

Each table stands between ``<!-- name -->`` and ``<!-- /name -->``. With --check nothing is written, and the exit status
is 1 where README.md says something else.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys

from resnet_fused.backends import backends
from resnet_fused.bench.records import Report, markdown_table, provenance_line
from resnet_fused.library import COMPILED_OPS
from resnet_fused.ops import OPS

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

#: Ops with a CUDA C++ kernel and with a Triton kernel: those that have a source file of their name.
CUDA_OPS = tuple(path.stem for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
TRITON_OPS = tuple(name for name in OPS if (ROOT / "resnet_fused" / "backends" / "triton" / f"{name}.py").exists())


def results() -> str:
    """The newest recorded run, whole-model rows."""
    runs = {path: Report.from_json(path.read_text()) for path in RESULTS.glob("*.json")}
    if not runs:
        return "No results are recorded yet."
    path, report = max(runs.items(), key=lambda item: item[1].provenance["date"])
    rows = [row for row in report.rows if row.name.startswith(("training step", "evaluation"))]
    batch = f"ResNet-50, {report.provenance['dtype']}, {report.provenance['device']}, against stock PyTorch eager"
    source = (
        f"From [`{path.name}`](benchmarks/results/{path.name}), which has every block shape as well; runs differ by a"
    )
    source += "\nfew per cent, and the others are beside it."
    return f"{batch}:\n\n{markdown_table(rows)}\n\n{source}\n{provenance_line(report.provenance)}"


def support() -> str:
    """Which backend has which op, in which dtypes, and how far that was tried."""
    cpu = backends()["cpu"].kernels
    lines = ["| op | CPU | Triton | CUDA C++ | reference |", "| --- | --- | --- | --- | --- |"]
    for name in OPS:
        where = "C++" if name in COMPILED_OPS else "oneDNN"
        tried = f"{where}: {dtypes(cpu[name].dtypes)}" if name in cpu else ""
        gpu = ["compiled: f32, bf16, f16" if name in have else "" for have in (TRITON_OPS, CUDA_OPS)]
        lines.append(f"| `{name}` | {tried} | {gpu[0]} | {gpu[1]} | any |")
    return "\n".join(lines)


def dtypes(found: tuple) -> str:
    """Short names."""
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
    return ", ".join(short[str(dtype).removeprefix("torch.")] for dtype in found)


def written(text: str) -> str:
    """README's text with its tables made anew."""
    for name, table in {"results": results, "support": support}.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for {name}; it needs one")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = README.read_text()
    after = written(before)
    if options.check:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
