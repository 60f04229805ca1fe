"""The degradation problem, and that residual learning solves it: He et al. 2015, figures 1, 4 and 6, at your desk.

    python examples/degradation.py      # a few minutes on two cores; writes examples/degradation.png and .csv

Plain and residual networks of growing depth learn the same 4,000 digits with the same settings. Deeper plain ones do
worse on the very images they are trained on, so it is not overfitting; deeper residual ones do not. All run fused.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import asked
import image_data
import outputs
import results
import torch
import torch.nn.functional as F
from asked import positive
from torch import nn
from tqdm import tqdm

import resnet_fused
from resnet_fused.models.cifar import CifarResNet
from resnet_fused.models.plain import CifarPlainNet
from resnet_fused.models.resnet import BasicBlock

HERE = pathlib.Path(__file__).parent


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[20, 56], help="layers, 6n+2 each [%(default)s]")
    add("--epochs", type=positive, default=5, help="[%(default)s]")
    add("--size", type=positive, default=32, help="pixels along an edge [%(default)s]")
    add("--batch", type=positive, default=128, help="[%(default)s]")
    add(
        "--lr",
        type=asked.not_negative,
        default=0.1,
        help="until half of the steps, a tenth until three quarters [%(default)s]",
    )
    add("--take", type=positive, help="so many digits only")
    add("--seed", type=asked.seed, default=0, help="[%(default)s]")
    add("--stock", action="store_true", help="as they are, not fused")
    add("--out", type=pathlib.Path, default=HERE / "degradation", help="results, without suffix [%(default)s]")
    return parser.parse_args(argv)


def blocks(depth: int) -> int:
    """The n of 6n+2 layers."""
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise SystemExit(f"--depths: {depth} is not 6n+2 layers, as 20, 32, 44, 56 or 110 are")
    return n


def network(kind: str, depth: int) -> nn.Module:
    """A net of the paper's section 4.2: a convolution, three stages of n blocks of two, a linear layer."""
    n = blocks(depth)
    return CifarPlainNet((n, n, n)) if kind == "plain" else CifarResNet(BasicBlock, (n, n, n))


def rate(step: int, steps: int, highest: float) -> float:
    """The paper's: a tenth after half of the steps, a hundredth after three quarters, with a short rise before."""
    falling = highest * (0.1 if step >= steps / 2 else 1) * (0.1 if step >= steps * 3 / 4 else 1)
    return falling * min(1, (step + 1) / 30)


def train(kind: str, depth: int, images, args: argparse.Namespace) -> list[dict]:
    """Rows of an epoch each: percent of the training images missed in it, and of the test images behind it."""
    torch.manual_seed(args.seed)
    net = network(kind, depth).to(memory_format=torch.channels_last)
    if not args.stock:
        resnet_fused.fuse(net)
    train_x, train_y, test_x, test_y = images
    per_epoch = len(train_x) // args.batch
    steps = args.epochs * per_epoch
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    rows, name, started = [], f"{kind} {depth}", time.monotonic()
    with tqdm(total=steps, desc=name, disable=None, leave=False) as bar:
        for epoch in range(args.epochs):
            net.train()
            order, missed, loss_sum = torch.randperm(len(train_x)), 0, 0.0
            for i in range(per_epoch):
                optimizer.param_groups[0]["lr"] = rate(epoch * per_epoch + i, steps, args.lr)
                chosen = order[i * args.batch : (i + 1) * args.batch]
                scores = net(train_x[chosen])
                loss = F.cross_entropy(scores, train_y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                missed += (scores.argmax(1) != train_y[chosen]).sum().item()
                loss_sum += loss.item()
                bar.update()
            row = {"net": name, "epoch": epoch + 1, "train_loss": loss_sum / per_epoch}
            row["train_error"] = 100 * missed / (per_epoch * args.batch)
            row["test_error"] = test_error(net, test_x, test_y, args.batch)
            rows.append(row)
    seconds = time.monotonic() - started
    tqdm.write(f"{name}: training error {row['train_error']:.2f}%, test {row['test_error']:.2f}%, {seconds:.0f} s")
    return rows


@torch.no_grad()
def test_error(net: nn.Module, images: torch.Tensor, classes: torch.Tensor, batch: int) -> float:
    net.eval()
    pairs = zip(images.split(batch), classes.split(batch), strict=True)
    return 100 * sum((net(x).argmax(1) != y).sum().item() for x, y in pairs) / len(images)


def plot(rows: list[dict], depths: list[int], path: pathlib.Path) -> None:
    """Plain nets on the left and residual ones on the right, training error solid and test error dashed."""
    figure, axes = results.axes(2, ["plain nets", "residual nets"])
    for axis, kind in zip(axes, ("plain", "residual"), strict=True):
        for depth, colour in zip(depths, results.colours(len(depths)), strict=True):
            mine = [row for row in rows if row["net"] == f"{kind} {depth}"]
            epochs = [row["epoch"] for row in mine]
            learned, tested = ([row[name] for row in mine] for name in ("train_error", "test_error"))
            results.line(axis, epochs, learned, color=colour, linewidth=2, label=f"{depth} layers")
            results.line(axis, epochs, tested, color=colour, linewidth=0.8, linestyle="--")
        axis.set_xlabel("epoch")
        axis.set_ylim(0, 100)
    axes[0].set_ylabel("error, %")
    axes[1].legend(frameon=False, fontsize=8, title="training solid, test dashed", title_fontsize=8)
    results.finish(figure, path)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    depths = list(dict.fromkeys(args.depths))
    for depth in depths:
        blocks(depth)  # refused before any is trained
    with outputs.held_by_name(args.out):
        compare(depths, args)


def compare(depths: list[int], args: argparse.Namespace) -> None:
    images = image_data.digit_sets(args.size)
    if args.take:
        taken = [image_data.spread(len(part), args.take) for part in images]
        images = tuple(part[chosen] for part, chosen in zip(images, taken, strict=True))
    images = [p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p for p in images]
    if len(images[0]) < args.batch:
        raise SystemExit(f"{len(images[0])} training images are less than a step's {args.batch}; lower --batch")
    rows = []
    for depth in depths:
        for kind in ("plain", "residual"):
            rows += train(kind, depth, images, args)
            results.write_csv(rows, args.out.with_suffix(".csv"))
            plot(rows, depths, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
