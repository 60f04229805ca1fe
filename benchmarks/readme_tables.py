"""Write the tables of README.md from what they are about: recorded results, and the backends' declarations.

Run:  python benchmarks/readme_tables.py [--check | --gpu FILE]

Each table stands between ``<!-- name -->`` and ``<!-- /name -->``. With --check nothing is written, and the exit status
is 1 where README.md says something else. With --gpu nothing is written either: it prints what a file of
``python -m resnet_fused gpu-report`` says. Such files are recorded in ``benchmarks/results/gpu/``; README.md needs a
place named gpu once there is one.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Iterator

import torch

import resnet_fused
from resnet_fused.backends import backends, onednn
from resnet_fused.bench import runs
from resnet_fused.bench.gpu_report import tables as gpu_tables
from resnet_fused.bench.gpu_report.stream import Document
from resnet_fused.bench.peers import OURS, STOCK
from resnet_fused.bench.records import Report, markdown_table, provenance_line
from resnet_fused.models import resnet50
from resnet_fused.ops import OPS

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

#: Of whose runs README's first table shows the newest.
MACHINE = "epyc-zen5-2core"
#: The family of README's table: member, paper, and the model that is benched for it.
FAMILY = (
    ("ResNet", "1512.03385", "resnet50"),
    ("ResNet, basic blocks", "1512.03385", "resnet18"),
    ("ResNet for CIFAR", "1512.03385", "resnet56"),
    ("identity mappings", "1603.05027", "preact_resnet50"),
    ("Wide ResNet", "1605.07146", "wrn28_10"),
    ("ResNeXt", "1611.05431", "resnext50_32x4d"),
    ("stochastic depth", "1603.09382", "resnet50_stochastic_depth"),
    ("DenseNet", "1608.06993", "densenet121"),
    ("squeeze-excite", "1709.01507", "timm:seresnet50"),
    ("ResNet-D", "1812.01187", "timm:resnet50d"),
    ("EfficientNet", "1905.11946", "timm:efficientnet_b0"),
)
#: The lines in which `all_models.py` counts verdicts, file by file.
COUNTED = re.compile(r"^(own|torchvision|timm)'s (\w+): (\d.*)$", re.MULTILINE)
#: What `machine_code.py` writes of a step: its name, heads and sums of all our kernels, others' time, the whole step's.
MACHINE_CODE = re.compile(
    r"(?m)^## (.*)\n\n\| kernel \|(.*)\|\n(?:\|.*\n)+\| all of them \|(.*)\|\n\n(?:Without .*\n\n)?"
    r"With (.*) ms for what others compute: (.*) ms predicted"
)
#: Ops with a CUDA C++ kernel and with a Triton kernel: those that have a source file of their name.
CUDA_OPS = tuple(path.stem for path in sorted((ROOT / "csrc" / "cuda").glob("*.cpp")))
TRITON_OPS = tuple(name for name in OPS if (ROOT / "resnet_fused" / "backends" / "triton" / f"{name}.py").exists())


def results() -> str:
    """The newest recorded run of ResNet-50 on `MACHINE`, whole-model rows."""
    benched = [run for run in runs.read(RESULTS) if run.kind == runs.BENCH and run.machine == MACHINE]
    recorded = [run for run in benched if run.provenance.get("model", "resnet50") == "resnet50"]
    if not recorded:
        return "No results are recorded yet."
    newest = max(recorded, key=lambda run: run.provenance["date"])
    report, place = newest.result, f"benchmarks/results/{newest.machine}/{runs.FILE}#L{newest.number}"
    rows = [row for row in report.rows if row.name.startswith(("training step", "evaluation"))]
    batch = f"ResNet-50, {report.provenance['dtype']}, {report.provenance['device']}, against stock PyTorch eager"
    source = f"From [`{newest.place}`]({place}), the newest run, with every block shape."
    source += f"\n{ranges(rows, [run.result for run in recorded], report)}"
    return f"{batch}:\n\n{markdown_table(rows)}\n\n{source}\n{provenance_line(report.provenance)}"


def family() -> str:
    """The newest recorded run of a model of each member of the family, on each machine."""
    head = ["member", "model, batch, size", "fused", "MB kept", "step: eager", "compile"]
    head += ["evaluation, batch 8, 32: eager", "compile", "run"]
    lines, benched = [head, ["---", "---", "---", *["---:"] * 5, "---"]], runs.read(RESULTS)
    for member, paper, model in FAMILY:
        found = [run for run in benched if run.kind == runs.BENCH and is_of_family(run, model)]
        newest = {run.machine: run for run in sorted(found, key=lambda run: run.provenance["date"])}
        for machine in sorted(newest, reverse=True):
            lines.append([f"[{member}](https://arxiv.org/abs/{paper})", *family_cells(newest[machine])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def covering() -> list[runs.Run]:
    """The newest run of `all_models.py`; of one that began above some size, those of the smaller models before it."""
    checked = [run for run in runs.read(RESULTS) if run.kind == "all_models" and COUNTED.search(run.result)]
    checked = [run for run in checked if "--only" not in run.provenance["command"]]
    checked.sort(key=lambda run: run.provenance["date"], reverse=True)
    found, least = [], None
    for run in checked:
        limits = dict(re.findall(r"--(above|max)-parameters (\S+)", run.provenance["command"]))
        if not found or limits.get("max") == least:
            found, least = [*found, run], limits.get("above")
        if least is None:
            break
    return found


def coverage() -> str:
    """Of the newest runs of `all_models.py`: for each file of models, how many agree with stock."""
    found = covering()
    if not found:
        return "No run is recorded yet."
    total: dict[tuple[str, str], collections.Counter] = {}
    for run in found:
        for family, file, verdicts in COUNTED.findall(run.result):
            counts = total.setdefault((family, file), collections.Counter())
            for number, word in re.findall(r"(\d+) (\w+(?:, as nothing is fused)?)", verdicts):
                counts[word] += int(number)
    lines = ["| models of | judged | agree with stock | of them with nothing to fuse |", "| --- | ---: | ---: | ---: |"]
    for (family, file), counts in sorted(total.items()):
        stock, judged = counts["agrees, as nothing is fused"], counts.total()
        whose = "`models`" if family == "own" else f"{family}'s"
        lines.append(f"| {whose} `{file}` | {judged} | {counts['agrees'] + stock} | {stock or ''} |")
    places = [
        f"[`{run.place}`](benchmarks/results/{run.machine}/{runs.FILE}#L{run.number}), `{run.provenance['command']}`"
        for run in found
    ]
    return "\n".join(lines) + f"\n\nFrom {', and '.join(places)}."


def is_of_family(run: runs.Run, model: str) -> bool:
    """Whether a run is of `model`, in float32, and says how much of it was fused."""
    given = run.provenance
    return given.get("model") == model and given.get("dtype") == "f32" and "fused" in given


def family_cells(run: runs.Run) -> list[str]:
    """What a run says of its model, but for the member's name."""
    rows = {(row.name, row.unit, row.peer): row for row in run.result.rows}
    (step,) = {name for name, unit, peer in rows if re.fullmatch(r"training step, batch \d+", name)}

    def against(name: str, peer: str) -> str:
        other, ours = rows.get((name, "ms", peer)), rows[name, "ms", OURS]
        return "" if other is None else f"{other.median / ours.median:.2f}x"

    kept = rows[step, "MB", OURS].median / rows[step, "MB", STOCK].median
    given, trained = run.provenance, step.rpartition(" ")[2]
    evaluated = [f"evaluation, batch {batch}" for batch in (8, 32)]
    cells = [f"`{given['model']}`, {trained}, {given['size']}", given["fused"], f"{kept:.2f}"]
    cells += [against(step, STOCK), against(step, "compile")]
    cells += [", ".join(filter(None, [against(name, peer) for name in evaluated])) for peer in (STOCK, "compile")]
    return [*cells, f"[{run.machine}:{run.number}](benchmarks/results/{run.machine}/{runs.FILE}#L{run.number})"]


def speedups(report: Report) -> dict[str, float]:
    """Stock's median time by ours, for every measurement of a run."""
    medians = {(row.name, row.peer): row.median for row in report.rows if row.unit == "ms"}
    return {name: stock / medians[name, OURS] for (name, peer), stock in medians.items() if peer == STOCK}


def ranges(rows, reports, quoted: Report) -> str:
    """Median and range of the recorded runs on the quoted one's device: times differ with the heap."""
    alike = [speedups(r) for r in reports if r.provenance["device"] == quoted.provenance["device"]]
    if len(alike) == 1:
        return "The only recorded run on this device."
    texts = []
    for name in dict.fromkeys(row.name for row in rows):
        found = [run[name] for run in alike if name in run]
        texts.append(f"{name} {statistics.median(found):.2f}x ({min(found):.2f}x to {max(found):.2f}x)")
    return f"All {len(alike)} recorded runs on this device, median (range): {'; '.join(texts)}."


def traffic() -> str:
    """What `explain` counts for ResNet-50 in 16-bit, and the times it predicts on GPUs."""
    found = resnet_fused.explain(resnet50(), (256, 3, 224, 224), dtype=torch.bfloat16)
    on_h100 = resnet_fused.explain(resnet50(), (256, 3, 224, 224), dtype=torch.bfloat16, device="h100")
    planned, block = on_h100.model, on_h100.blocks[1]
    programs = (planned.fused, planned.compiled, planned.stock)
    rows = [["MB moved per image, planned for an H100", *(f"{program.bytes / 256e6:.0f}" for program in programs)]]
    saved = (planned.fused_saved, planned.stock_saved, planned.stock_saved)
    rows += [["MB saved for backward per image, same plan", *(f"{bytes / 256e6:.1f}" for bytes in saved)]]
    launches = (block.fused.launches, block.compiled.launches, block.stock.launches)
    rows += [["kernels started in an identity bottleneck, same plan", *map(str, launches)]]
    for row in found.predictions:
        times = (row.fused, row.compiled, row.stock)
        ranges = (f"{time.low * 1e3:.0f} to {time.high * 1e3:.0f}" for time in times)
        rows.append([f"ms predicted on {row.device.name}", *ranges])
    hosts = (on_h100.predictions[0].fused, on_h100.predictions[0].compiled, on_h100.predictions[0].stock)
    rows.append(["of them ms of the host's, without a CUDA graph", *(f"{time.host * 1e3:.0f}" for time in hosts)])
    head = ["training step, batch 256, bf16", "fused", "torch.compile", "eager"]
    lines = [head, ["---", "---:", "---:", "---:"], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_code() -> str:
    """What the newest runs of `machine_code.py` predict of each step and GPU: all of its kernels, and the whole."""
    read = [run for run in runs.read(RESULTS) if run.kind == "machine_code"]
    rows, head = {}, ""
    for run in sorted(read, key=lambda run: run.provenance["date"], reverse=True):
        place = f"[{run.machine}:{run.number}](benchmarks/results/{run.machine}/{runs.FILE}#L{run.number})"
        for name, titles, total, others, whole in MACHINE_CODE.findall(run.result):
            head = head or titles
            rows.setdefault(name, f"| {name} |{total}| {others} | {whole} | {place} |")
    lines = [f"| step |{head}| others' | whole step | run |", "| --- " * (head.count("|") + 5) + "|", *rows.values()]
    return "\n".join(lines) if rows else "No run is recorded yet."


def gpu_reports() -> dict[pathlib.Path, Document]:
    """The recorded files of ``gpu-report``, by path."""
    return {path: Document.from_file(path) for path in sorted((RESULTS / "gpu").glob("*.json"))}


def gpu() -> str:
    """The newest report of each GPU."""
    newest: dict[str, tuple[pathlib.Path, Document]] = {}
    for path, report in sorted(gpu_reports().items(), key=lambda item: item[1].provenance["date"]):
        newest[report.provenance["device"]] = path, report
    texts = []
    for path, report in newest.values():
        source = f"From [`{path.name}`](benchmarks/results/gpu/{path.name}): {gpu_tables.provenance(report)}"
        texts += [gpu_tables.models(report), gpu_tables.kernels(report), gpu_tables.failures(report), source]
    return "\n\n".join(filter(None, texts)) or "No report of a GPU is recorded yet."


def verdicts_on_gpus() -> Iterator[tuple[str, dict]]:
    """Device and verdict of each check of a kernel that `verify --json` or `gpu-report` recorded."""
    for path in sorted((RESULTS / "verify").glob("*.json")):
        record = json.loads(path.read_text())
        yield from ((record["provenance"]["device"], row) for row in record["kernels"])
    for report in gpu_reports().values():
        yield from ((report.provenance["device"], row) for row in gpu_tables.verdicts(report))


def recorded_on_gpus() -> dict[tuple[str, str], str]:
    """By backend and op: what was recorded on GPUs."""
    verdicts: dict[tuple[str, str], dict[str, bool]] = {}
    for name, row in verdicts_on_gpus():
        if row["backend"] in ("triton", "cuda") and row["status"] != "skipped":
            devices = verdicts.setdefault((row["backend"], row["op"]), {})
            devices[name] = devices.get(name, True) and row["status"] == "passed"
    return {
        key: "; ".join(f"{'passed' if ok else 'FAILED'} on {name}" for name, ok in devices.items())
        for key, devices in verdicts.items()
    }


def support() -> str:
    """Which backend has which op, in which dtypes, and how far that was tried."""
    cpu, recorded = backends()["cpu"].kernels, recorded_on_gpus()
    lines = ["| op | CPU | Triton | CUDA C++ | reference |", "| --- | --- | --- | --- | --- |"]
    for name in OPS:
        where = "oneDNN, else ATen" if name in onednn.KERNELS else "C++"
        tried = f"{where}: {dtypes(cpu[name].dtypes)}" if name in cpu else ""
        have = {"triton": TRITON_OPS, "cuda": CUDA_OPS}
        gpu = [recorded.get((b, name), "compiled, not run") if name in ops else "" for b, ops in have.items()]
        lines.append(f"| `{name}` | {tried} | {gpu[0]} | {gpu[1]} | any |")
    return "\n".join(lines)


def dtypes(found: tuple) -> str:
    """Short names."""
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
    return ", ".join(short[str(dtype).removeprefix("torch.")] for dtype in found)


def written(text: str) -> str:
    """README's text with its tables made anew."""
    tables = {"results": results, "family": family, "coverage": coverage, "traffic": traffic, "support": support}
    if gpu_reports() or "<!-- gpu -->" in text:
        tables["gpu"] = gpu
    if "<!-- machine code -->" in text:
        tables["machine code"] = machine_code
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for {name}; it needs one")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--gpu", type=pathlib.Path, metavar="FILE", help="print what this report of a GPU says")
    options = parser.parse_args()
    if options.gpu:
        print(gpu_tables.summary(Document.from_file(options.gpu)))
        return 0
    before = README.read_text()
    after = written(before)
    if options.check:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
