"""Tables and pictures of what the examples found."""

from __future__ import annotations

import csv
import pathlib

import outputs

try:
    import matplotlib
except ImportError as error:
    raise SystemExit(f"the examples draw with matplotlib ({error}): pip install 'resnet-fused[examples]'") from error
matplotlib.use("Agg")
from matplotlib import pyplot

GREY, BLUE, ORANGE, GREEN = "#9aa0a6", "#1a73e8", "#e8710a", "#188038"


def write_csv(rows: list[dict], path: pathlib.Path) -> None:
    with outputs.writing(path), open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: short(value) for name, value in row.items()} for row in rows)


def short(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value


def axes(columns: int, titles: list[str], width: float = 4.6):
    """A figure with some axes beside each other, plainly framed."""
    figure, row = pyplot.subplots(1, columns, squeeze=False, layout="constrained", figsize=(width * columns, 3.6))
    for axis, title in zip(row[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4, alpha=0.6)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # else fractions around a single one
    return figure, row[0]


def line(axis, x, y, **style) -> None:
    """A line through points; a single one, through which none goes, is marked."""
    axis.plot(x, y, marker="." if len(x) == 1 else None, **style)


def colours(count: int) -> list:
    """So many different ones."""
    few = [ORANGE, BLUE, GREEN, GREY]
    return few[:count] if count <= len(few) else [matplotlib.colormaps["viridis"](i / count) for i in range(count)]


def finish(figure, path: pathlib.Path) -> None:
    with outputs.writing(path):
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_training(history: list[dict], path: pathlib.Path) -> None:
    """Loss and error by epoch, of training and test images and of averaged weights."""
    figure, (losses, errors) = axes(2, ["loss", "error, %"])
    epochs = [row["epoch"] for row in history]
    for name, label, colour in (
        ("train", "training", GREY), ("test", "test", BLUE), ("average_test", "test, averaged weights", ORANGE)
    ):  # fmt: skip
        if f"{name}_loss" in history[0]:
            losses.plot(epochs, [row[f"{name}_loss"] for row in history], color=colour, marker=".", label=label)
            errors.plot(
                epochs, [100 - row[f"{name}_accuracy"] for row in history], color=colour, marker=".", label=label
            )
    for axis in (losses, errors):
        axis.set_xlabel("epoch")
        axis.set_ylim(bottom=0)
    losses.legend(frameon=False, fontsize=8)
    finish(figure, path)
