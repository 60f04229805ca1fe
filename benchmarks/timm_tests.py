"""Run timm's own tests/test_models.py on stock and on fused models, and compare the outcomes test by test.

    git clone https://github.com/huggingface/pytorch-image-models
    python benchmarks/timm_tests.py --tests pytorch-image-models/tests --filter 'resnet*' --filter 'regnet*'
    python benchmarks/timm_tests.py --tests pytorch-image-models/tests --quick --max-parameters 60 -- -k backward

Every model that timm's ``create_model`` hands to a test goes through ``resnet_fused.fuse`` first
(``timm_tests_models.py``); the tests themselves run from where they lie, with the timm that is installed here. Exits
with 1 where stock passes and fused does not. Tests that ask for equal bits are listed apart, each with the difference
that it saw: a fused chain sums in another order. Words behind ``--`` go to pytest. Needs pytest, pytest-xdist and timm.
``--record benchmarks/results`` keeps the tables.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from resnet_fused.bench import runs

HERE = pathlib.Path(__file__).resolve().parent
SHOWN = 20  # differences in rounding that are listed; all are in the log
#: Not run unless asked for with ``-k``: they download weights.
DOWNLOADS = "not pretrained and not test_model_inference"


@dataclasses.dataclass
class Outcome:
    """What became of one test, on one side."""

    #: passed, failed, skipped, left out (by an option), or missing: its process died before it could say.
    outcome: str = "missing"
    reason: str = ""
    bitwise: str = ""  # of a failure: it asked for equal bits, and saw this difference
    fused: int | None = None  # modules that fuse() fused in its models; None: it made none


@dataclasses.dataclass
class Pair:
    """One test on both sides."""

    test: str
    stock: Outcome
    fused: Outcome

    @property
    def verdict(self) -> str:
        """Where fused and stock differ, in one word; empty where they agree."""
        if self.stock.outcome == "failed" and self.fused.outcome == "passed":
            return "better"
        if self.stock.outcome != "passed" or self.fused.outcome in ("passed", "left out"):
            return ""
        return "bitwise" if self.fused.bitwise else "worse"


def run_tests(options: argparse.Namespace, side: str, log: pathlib.Path, only: list[str] | None = None) -> int:
    """Run pytest, which adds a line for every test to `log`; returns its exit code."""
    command = [sys.executable, "-m", "pytest", str(options.tests / "test_models.py")]
    command += ["-p", "timm_tests_plugin", "-p", "no:cacheprovider", "-q", "--import-mode=importlib", "-o", "addopts="]
    command += ["-n", str(options.workers), "--tb=short", "--no-header", "-W", "ignore"]
    command += ["--fused-side", side, "--fused-log", str(log)]
    command += [word for name in options.filter for word in ("--fused-filter", name)]
    command += [f"--fused-max-parameters={options.max_parameters}"]
    command += ["--fused-quick"] if options.quick else []
    command += ["--fused-as-planned"] if options.as_planned else []
    command += ["-k", DOWNLOADS] if "-k" not in options.pytest else []
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, options.workers))), **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        if only is not None:
            file.write("\n".join(only))
            file.flush()
            command += ["--fused-only", file.name]
        return subprocess.run([*command, *options.pytest], env=environment, check=False).returncode


def read(log: pathlib.Path) -> list[Pair]:
    """Both outcomes of every test that was started."""
    pairs: dict[str, Pair] = {}
    for line in log.read_text().splitlines():
        row = json.loads(line)
        pair = pairs.setdefault(row["test"], Pair(row["test"], Outcome(), Outcome()))
        setattr(pair, row["side"], Outcome(row["outcome"], row["reason"], row["bitwise"], row["fused"]))
    return list(pairs.values())


def table(pairs: list[Pair]) -> str:
    """Outcomes by test function, as markdown."""
    groups: dict[str, list[Pair]] = collections.defaultdict(list)
    for pair in pairs:
        groups[pair.test.partition("[")[0].rpartition("::")[2]].append(pair)
    groups["all"] = pairs
    head = ["test", "models", "with fused modules", "stock passed", "fused passed", "skipped", "left out"]
    head += ["bitwise", "worse"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, group in groups.items():
        counts = (
            len(group),
            sum(bool(pair.fused.fused) for pair in group),
            sum(pair.stock.outcome == "passed" for pair in group),
            sum(pair.fused.outcome == "passed" for pair in group),
            sum(pair.fused.outcome == "skipped" for pair in group),
            sum(pair.fused.outcome == "left out" for pair in group),
            sum(pair.verdict == "bitwise" for pair in group),
            sum(pair.verdict == "worse" for pair in group),
        )
        lines.append([name, *map(str, counts)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def differences(pairs: list[Pair]) -> str:
    """Every test whose outcomes differ, and why."""
    lines = []
    for verdict, title in (
        ("worse", "Fails fused where stock passes"),
        ("bitwise", "Asks for equal bits, or for less than rounding, and gets other rounding"),
        ("better", "Passes fused where stock fails"),
    ):
        chosen = [pair for pair in pairs if pair.verdict == verdict]
        lines += [f"\n{title} ({len(chosen)}):"] if chosen else []
        shown = chosen[:SHOWN] if verdict == "bitwise" else chosen
        for pair in shown:
            reason = pair.stock.reason if verdict == "better" else pair.fused.bitwise or pair.fused.reason
            lines.append(f"  {pair.test.rpartition('::')[2]}: {pair.fused.outcome}; {reason}")
        lines += [f"  and {len(chosen) - len(shown)} more"] if len(chosen) > len(shown) else []
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; everything it does not know goes to pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=pathlib.Path, required=True, help="the folder tests/ of a checkout of timm")
    parser.add_argument("--filter", action="append", default=[], metavar="PATTERN", help="models by name; repeatable")
    parser.add_argument("--workers", type=int, default=2, help="processes, default 2; 0: none but pytest's own")
    parser.add_argument("--max-parameters", type=float, default=0, metavar="MILLIONS", help="leave larger models out")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out models in which nothing is fused, and run stock only where fused does not pass",
    )
    parser.add_argument(
        "--as-planned",
        action="store_true",
        help="leave to stock what the plan leaves to it at the tests' small sizes (default: run all that is fused)",
    )
    parser.add_argument("--log", type=pathlib.Path, help="keep the outcomes in this file, a JSON object a line")
    runs.add_option(parser)
    parser.add_argument("pytest", nargs="*", help="words for pytest, behind --")
    options = parser.parse_args(arguments)
    options.tests = options.tests.resolve()
    if not (options.tests / "test_models.py").is_file():
        parser.error(f"{options.tests} has no test_models.py; pass the folder tests/ of a checkout of timm")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        log = (options.log or pathlib.Path(folder) / "outcomes.jsonl").resolve()
        log.write_text("")
        for side in ("fused", "stock"):
            only = [pair.test for pair in read(log) if pair.fused.outcome in ("failed", "skipped")]
            if side == "stock" and options.quick and not only:
                continue
            code = run_tests(options, side, log, only if side == "stock" and options.quick else None)
            if code not in (0, 1):  # 1: some failed, which is for the comparison to judge
                print(f"pytest did not finish on the {side} side (exit code {code})", file=sys.stderr)
                return 2
        pairs = read(log)
    worse = sum(pair.verdict == "worse" for pair in pairs)
    with runs.printing("timm_tests", options.record, timm=importlib.metadata.version("timm")):
        print("\n" + table(pairs) + "\n" + differences(pairs))
        print(f"{len(pairs)} tests: {worse} fail fused where stock passes")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
