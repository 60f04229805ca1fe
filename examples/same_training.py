"""Fused training is the same training: its losses lie as near stock's as stock's own, summed in another order.

    python examples/same_training.py     # minutes on two cores; writes examples/same_training.png and .csv

One network is trained three times from one seed on the same digits: stock with images in channels_last, stock with
contiguous images, fused. Floating-point sums in another order differ in their last bit, and training makes such a
difference grow, until two runs that are equally right are some percent apart. What fusion adds must be no more.
"""

from __future__ import annotations

import argparse
import pathlib

import asked
import image_data
import outputs
import results
import torch
import torch.nn.functional as F
from asked import positive
from tqdm import tqdm

import resnet_fused

HERE = pathlib.Path(__file__).parent
STOCK, OTHER, FUSED = "stock, channels_last", "stock, contiguous", "fused"


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="resnet20", help="of resnet_fused.models, timm:NAME or torchvision:NAME [%(default)s]")
    add("--steps", type=positive, default=250, help="[%(default)s]")
    add("--size", type=positive, default=32, help="pixels along an edge [%(default)s]")
    add("--batch", type=positive, default=64, help="[%(default)s]")
    add("--lr", type=asked.not_negative, default=0.05, help="[%(default)s]")
    add("--double", action="store_true", help="in float64, where nothing but a fault is seen early")
    add("--seed", type=asked.seed, default=0, help="[%(default)s]")
    add("--out", type=pathlib.Path, default=HERE / "same_training", help="results, without suffix [%(default)s]")
    return parser.parse_args(argv)


def losses(run: str, args: argparse.Namespace) -> list[float]:
    """The loss at each step of one run."""
    torch.manual_seed(args.seed)
    layout = torch.contiguous_format if run == OTHER else torch.channels_last
    dtype = torch.float64 if args.double else torch.float32
    net = asked.network(args.model, 10).to(dtype, memory_format=layout).train()
    if run == FUSED:
        resnet_fused.fuse(net, backend="cpu", strict=True)  # by name: also blocks too small to gain by it
    images, classes, _, _ = image_data.digit_sets(args.size)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    found = []
    for _ in tqdm(range(args.steps), desc=run, disable=None, leave=False):
        chosen = torch.randint(len(images), (args.batch,))
        loss = F.cross_entropy(net(images[chosen].to(dtype, memory_format=layout)), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def apart(one: list[float], other: list[float], window: int = 20) -> torch.Tensor:
    """How far two runs are apart at each step: the root mean square of the last differences of their losses."""
    squares = (torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)).square()
    sums = F.pad(squares.cumsum(0), (1, 0))
    ends = torch.arange(1, len(squares) + 1)
    starts = (ends - window).clamp_min(0)
    return ((sums[ends] - sums[starts]).clamp_min(0) / (ends - starts)).sqrt()


def plot(runs: dict[str, list[float]], path: pathlib.Path) -> None:
    figure, (curves, distances) = results.axes(2, ["loss", "distance from stock, channels_last"])
    colours = {STOCK: results.GREY, OTHER: results.ORANGE, FUSED: results.BLUE}
    for run, values in runs.items():
        widths = {STOCK: 3.5, OTHER: 2, FUSED: 0.8}
        window = max(1, min(10, len(values) // 5))
        smooth = F.avg_pool1d(torch.tensor(values)[None], window, 1)[0]
        steps = range(1, len(values) + 1)
        results.line(curves, steps[window - 1 :], smooth, color=colours[run], linewidth=widths[run], label=run)
        if run != STOCK:
            distances.set_yscale("log")
            far = apart(values, runs[STOCK])
            results.line(distances, steps, far, color=colours[run], linewidth=1.2, label=run)
    for axis in (curves, distances):
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=8)
    results.finish(figure, path)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    args = options(argv)
    with outputs.held_by_name(args.out):
        return compare(args)


def compare(args: argparse.Namespace) -> dict[str, list[float]]:
    runs = {run: losses(run, args) for run in (STOCK, OTHER, FUSED)}
    rows = [{"step": i + 1, **{run: values[i] for run, values in runs.items()}} for i in range(args.steps)]
    results.write_csv(rows, args.out.with_suffix(".csv"))
    plot(runs, args.out.with_suffix(".png"))
    for run in (OTHER, FUSED):
        print(f"{run}: at the end {apart(runs[run], runs[STOCK])[-1]:.3g} from {STOCK} by loss")
    return runs


if __name__ == "__main__":
    main()
