"""Fuse every ResNet that can be built offline and hold it to stock: outputs and all gradients against float64.

    python benchmarks/all_models.py                      # ours, torchvision's and timm's resnet.py
    python benchmarks/all_models.py --family timm --only 'resnet*d' --max-parameters 80
    python benchmarks/all_models.py --record benchmarks/results

For each model: one training step on photographs-sized noise, stock and fused and stock in float64; every output, every
gradient and every buffer may err at most twice as much as stock (``resnet_fused.bench.equality`` says how flipped ReLUs
are dealt with), for the model and for each kind of block by itself. A model that exceeds a limit on one input is run on
RETRIALS inputs and judged by the medians: through some hundred layers with random weights, rounding is amplified until
one draw says little about either side. Exits with 1 where one disagrees.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from torch import nn

import resnet_fused
from resnet_fused.bench import equality, runs
from resnet_fused.models import BUILDERS
from resnet_fused.plan import choose
from resnet_fused.testing.vision import import_torchvision

RETRIALS = 7
FAMILIES = ("own", "torchvision", "timm")


def names(family: str) -> list[str]:
    """The models of a family that are residual networks with blocks of ``resnet.py``."""
    if family == "own":
        return list(BUILDERS)
    if family == "torchvision":
        models = import_torchvision().models
        return [name for name in models.list_models(module=models) if "resnet" in name or "resnext" in name]
    import_torchvision()
    import timm

    return timm.list_models(module="resnet")


def build(family: str, name: str) -> nn.Module:
    """A freshly initialised model with ten classes."""
    torch.manual_seed(0)
    if family == "own":
        return BUILDERS[name](num_classes=10)
    if family == "torchvision":
        return import_torchvision().models.get_model(name, weights=None, num_classes=10)
    import_torchvision()
    import timm

    return timm.create_model(name, num_classes=10)


def batch(seed: int, size: int) -> torch.Tensor:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def check(model: nn.Module, size: int) -> tuple[str, list[equality.Difference]]:
    """What was fused of `model`, and the differences that are too large."""
    equality.scatter_norms(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = resnet_fused.fuse(copy.deepcopy(model))
    report = resnet_fused.report(fused)
    found = equality.check(model, fused, batch(0, size), [row.name for row in report.fused if row.name])
    reasons = {row.reason for row in report.left}
    text = f"{len(report.fused)} fused, {len(report.left)} left" + (
        f" ({'; '.join(sorted(reasons))})" if reasons else ""
    )
    wrong = [difference for difference in found if not difference.agrees]
    if wrong and all(": " not in difference.tensor for difference in wrong):  # only of the whole model
        trials = [(model, fused, batch(seed, size)) for seed in range(RETRIALS)]
        again = equality.compare(trials, None, equality.FLIP_ALLOWANCE)
        text += f", medians of {RETRIALS} inputs because of {wrong[0]}"
        wrong = [difference for difference in again if not difference.agrees]
    return text, wrong


def selected(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Family and name of every model asked for."""
    for family in options.family:
        for name in names(family):
            if fnmatch.fnmatch(name, options.only):
                yield family, name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="repeatable; default: all three")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models whose name matches, as in a shell")
    parser.add_argument("--size", type=int, default=64, help="resolution, default 64")
    parser.add_argument("--max-parameters", type=float, default=1e9, metavar="MILLIONS", help="leave larger models out")
    runs.add_option(parser)
    options = parser.parse_args()
    options.family = options.family or list(FAMILIES)
    with runs.printing("all_models", options.record, dtype="f32", size=options.size):
        wrong = compare(options)
    return 1 if wrong else 0


def compare(options: argparse.Namespace) -> int:
    """Print what became of every model asked for; returns how many disagree."""
    wrong = 0
    for family, name in selected(options):
        start = time.perf_counter()
        model = build(family, name)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        if millions > options.max_parameters:
            print(f"{family}:{name}: left out, {millions:.0f} M parameters", flush=True)
            continue
        with choose.fusing_all():  # small as the images are
            text, differences = check(model, options.size)
        wrong += bool(differences)
        verdict = "DISAGREES" if differences else "agrees"
        print(f"{family}:{name}: {verdict}; {text}; {time.perf_counter() - start:.0f} s", flush=True)
        for difference in differences[:5]:
            print(f"    {difference}", flush=True)
    print(f"{wrong} models disagree")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
