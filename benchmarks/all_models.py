"""Fuse every model of the family that can be built offline and hold it to stock: outputs and gradients against float64.

    python benchmarks/all_models.py                      # ours, torchvision's and timm's
    python benchmarks/all_models.py --family timm --module densenet --module regnet --max-parameters 30
    python benchmarks/all_models.py --only 'resnet*d' --resume checked.jsonl
    python benchmarks/all_models.py --record benchmarks/results

For each model: one training step and an evaluation on photograph-sized noise, stock and fused and stock in float64;
every output, every gradient and every buffer may err at most twice as much as stock (``resnet_fused.bench.equality``
says how flipped ReLUs are dealt with), for the model and for each kind of block by itself. A model that exceeds a limit
on one input is run on RETRIALS inputs and judged by the medians: through some hundred layers with random weights,
rounding is amplified until one draw says little about either side.

A model of which nothing is fused is told apart and not run: it is stock. Smallest models first, a line for each as it
is done. Exits with 1 where one disagrees or was not judged.

A model of more than LARGE million parameters exists once: stock, fused and float64 have them in turn, in 12 bytes for
each instead of 28 (with the gradients of one, and what evaluation folds); its gradients of float64 are in files.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import fnmatch
import json
import pathlib
import sys
import time
import types
import warnings
from collections.abc import Iterator

import torch
from torch import nn

import resnet_fused
from resnet_fused.bench import equality, records, runs
from resnet_fused.models import BUILDERS
from resnet_fused.plan import choose
from resnet_fused.testing.vision import import_torchvision

RETRIALS, LARGE = 7, 200.0
FAMILIES = ("own", "torchvision", "timm")
#: Files of torchvision's and of timm's models that are residual networks or their neighbours.
MODULES = {
    "torchvision": ("resnet", "densenet", "regnet"),
    "timm": ("resnet", "resnetv2", "densenet", "resnest", "res2net", "sknet", "regnet", "hrnet"),
}
AGREES, STOCK, DISAGREES, FAILED = "agrees", "agrees, as nothing is fused", "DISAGREES", "FAILED"


@dataclasses.dataclass(frozen=True)
class Model:
    """One that can be asked for."""

    family: str
    module: str  # the file that it is built in
    name: str

    def __str__(self) -> str:
        return f"{self.family}:{self.name}"

    def build(self, **options: object) -> nn.Module:
        """A freshly initialised model with ten classes."""
        torch.manual_seed(0)
        if self.family == "own":
            return BUILDERS[self.name](num_classes=10, **options)
        if self.family == "torchvision":
            return import_torchvision().models.get_model(self.name, weights=None, num_classes=10, **options)
        return import_timm().create_model(self.name, num_classes=10, **options)

    def millions(self) -> float:
        """Its parameters, which are not made; of torchvision's those of a thousand classes, as it lists them."""
        if self.family == "torchvision":
            return import_torchvision().models.get_model_weights(self.name).DEFAULT.meta["num_params"] / 1e6
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters()) / 1e6


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a model."""

    verdict: str
    text: str
    wrong: tuple[str, ...] = ()


def import_timm() -> types.ModuleType:
    """timm, which imports torchvision."""
    import_torchvision()
    import timm

    return timm


def models_of(family: str) -> Iterator[Model]:
    """The models of a family that are residual networks or their neighbours."""
    if family == "own":
        for name, builder in BUILDERS.items():
            yield Model(family, builder.__module__.rpartition(".")[2], name)
    elif family == "torchvision":
        library = import_torchvision().models
        for name in library.list_models(module=library):
            module = library.get_model_builder(name).__module__.rpartition(".")[2]
            if module in MODULES[family]:
                yield Model(family, module, name)
    else:
        for module in MODULES[family]:
            for name in import_timm().list_models(module=module):
                yield Model(family, module, name)


def batch(seed: int, size: int) -> torch.Tensor:
    """Few images, but not two: a norm of means over pixels then has no gradient but by its epsilon."""
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def check(model: nn.Module, size: int) -> Verdict:
    """Whether `model`, fused, agrees with itself, and what of it was fused."""
    equality.scatter_norms(model)
    parameters = list(model.parameters())
    large = sum(parameter.numel() for parameter in parameters) > LARGE * 1e6
    copies, before = equality.lent if large else equality.copied, [*map(fingerprint, parameters)] if large else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = resnet_fused.fuse(copy.deepcopy(model, {id(p): p for p in parameters} if large else None))
    if large and [*map(fingerprint, model.parameters())] != before:
        return Verdict(DISAGREES, "fuse() changed parameters")
    report = resnet_fused.report(fused)
    reasons = sorted({row.reason for row in report.rows if row.reason})
    text = f"{report.convolutions} convolutions, {report.passes} passes"
    text += f" ({'; '.join(reasons)})" if reasons else ""
    if not report.fused:
        return Verdict(STOCK, text)
    names = [row.name for row in report.fused]
    names = [name for name in names if name and not any(other.startswith(f"{name}.") for other in names)]
    with choose.fusing_all():  # small as the images are
        text += "".join(f"; at the call {line}" for line in stocked(fused, size, copies))
        found = equality.check(model, fused, batch(0, size), names, copies=copies)
        wrong = [difference for difference in found if not difference.agrees]
        if wrong and all(": " not in difference.tensor for difference in wrong):  # only of the whole model
            trials = [(model, fused, batch(seed, size)) for seed in range(RETRIALS)]
            again = equality.compare(trials, None, equality.FLIP_ALLOWANCE, copies=copies)
            text += f"; medians of {RETRIALS} inputs because of {wrong[0]}"
            wrong = [difference for difference in again if not difference.agrees]
    return Verdict(DISAGREES if wrong else AGREES, text, tuple(map(str, wrong)))


@torch.no_grad()
def fingerprint(parameter: nn.Parameter) -> tuple[float, ...]:
    """What tells a parameter from one that was written to."""
    return parameter.data_ptr(), parameter.sum().item(), parameter.norm().item()


@torch.no_grad()
def stocked(fused: nn.Module, size: int, copies: equality.Copies) -> list[str]:
    """What a training forward says that it leaves to stock of what the report calls fused, each once."""
    with choose.observing() as said, torch.enable_grad(), copies(fused, False) as model:
        model.train()(batch(0, size))
    return sorted({line for line in said if "stock" in line})


def selected(options: argparse.Namespace) -> Iterator[tuple[float, Model]]:
    """Every model asked for with its millions of parameters, smallest first; says which are left out."""
    found = []
    for family in options.family:
        for model in models_of(family):
            if fnmatch.fnmatch(model.name, options.only) and (not options.module or model.module in options.module):
                found.append((model.millions(), model))
    for millions, model in sorted(found, key=lambda pair: pair[0]):
        if options.above_parameters < millions <= options.max_parameters:
            yield millions, model
        elif millions > options.max_parameters:
            print(f"{model}: left out, {millions:.0f} M parameters", flush=True)


def judged(model: Model, size: int) -> Verdict:
    """The verdict on a model; of one that cannot be built or run, why."""
    try:
        return check(model.build(), size)
    except Exception as error:  # whatever it is, the next models are to be judged all the same
        return Verdict(FAILED, f"{type(error).__name__}: {error}")


def compare(options: argparse.Namespace) -> int:
    """Print what became of every model asked for; returns how many disagree or were not judged, or 1 if none was."""
    revision = records.git_revision()
    known = {} if revision.endswith("-dirty") else read(options.resume)  # which changes, nobody knows
    counts: dict[str, collections.Counter] = {}
    for millions, model in selected(options):
        start, key = time.perf_counter(), f"{model} {options.size} {revision}"
        verdict = known.get(key)
        if verdict is None:
            verdict = judged(model, options.size)
            if options.resume:
                with options.resume.open("a") as file:
                    file.write(json.dumps({"key": key} | dataclasses.asdict(verdict)) + "\n")
        spent = f"{time.perf_counter() - start:.0f} s"
        print(f"{model}: {verdict.verdict}; {millions:.0f} M; {verdict.text}; {spent}", flush=True)
        for difference in verdict.wrong[:5]:
            print(f"    {difference}", flush=True)
        counts.setdefault(f"{model.family}'s {model.module}", collections.Counter())[verdict.verdict] += 1
    for module, verdicts in counts.items():
        print(f"{module}: {', '.join(f'{number} {word}' for word, number in sorted(verdicts.items()))}")
    if not counts:
        print("no model was judged: see --family, --module, --only and --max-parameters")
        return 1
    return sum(verdicts[word] for verdicts in counts.values() for word in (DISAGREES, FAILED))


def read(path: pathlib.Path | None) -> dict[str, Verdict]:
    """The verdicts of an interrupted run. Cuts a last line off that is not whole: a model is judged again, then."""
    if path is None or not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line.pop("key"): Verdict(line["verdict"], line["text"], tuple(line["wrong"])) for line in lines}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="repeatable; default: all three")
    parser.add_argument("--module", action="append", metavar="FILE", help="of this file, e.g. densenet; repeatable")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models whose name matches, as in a shell")
    parser.add_argument("--size", type=int, default=64, help="resolution, default 64")
    parser.add_argument("--max-parameters", type=float, default=1e9, metavar="MILLIONS", help="leave larger models out")
    parser.add_argument(
        "--above-parameters",
        type=float,
        default=0,
        metavar="MILLIONS",
        help="only larger ones, after a run of the others",
    )
    parser.add_argument(
        "--resume",
        type=pathlib.Path,
        metavar="FILE",
        help="keep verdicts here, and repeat none of this revision's, if it is not dirty",
    )
    runs.add_option(parser)
    options = parser.parse_args(arguments)
    options.family = options.family or list(FAMILIES)
    with runs.printing("all_models", options.record, dtype="f32", size=options.size):
        wrong = compare(options)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
