"""A picture of a report: every measurement as bars, one per peer, relative to stock."""

from __future__ import annotations

import pathlib

from .errors import Refused
from .records import Report, Row, provenance_line, short

COLOURS = ("#9aa0a6", "#1a73e8", "#e8710a", "#188038")


def plot(report: Report, path: str | pathlib.Path) -> None:
    """Write `report` to `path` (.png, .svg or .pdf): time above, memory below, stock at 100%.

    Raises:
        Refused: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise Refused(f"--plot needs matplotlib ({error}); pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    units = [unit for unit in ("ms", "MB") if any(row.unit == unit for row in report.rows)]
    peers = list(dict.fromkeys(row.peer for row in report.rows))
    counts = [len({row.name for row in report.rows if row.unit == unit}) for unit in units]
    figure, axes = pyplot.subplots(
        len(units), squeeze=False, layout="constrained", height_ratios=counts,
        figsize=(10, 1.6 + sum(counts) * (0.14 + 0.17 * len(peers))),
    )  # fmt: skip
    for axis, unit in zip(axes[:, 0], units, strict=True):
        draw(axis, [row for row in report.rows if row.unit == unit], peers, unit)
    axes[0, 0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.02), ncols=len(peers), frameon=False)
    text = provenance_line(report.provenance)
    figure.supxlabel("\n".join(wrap(text, 125)), fontsize=7, color="#5f6368")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw(axis, rows: list[Row], peers: list[str], unit: str) -> None:
    """Horizontal bars in percent of stock, each with its figure and, for times, the 10-90% range."""
    names = list(dict.fromkeys(row.name for row in rows))
    stock = {row.name: row.median for row in rows if row.peer == peers[0]}
    height = 0.8 / len(peers)
    for row in rows:
        if not stock.get(row.name):
            continue
        percent = 100 / stock[row.name]
        place = names.index(row.name) + (peers.index(row.peer) - (len(peers) - 1) / 2) * height
        low, high = max(0.0, row.median - row.q10), max(0.0, row.q90 - row.median)
        axis.barh(
            place, row.median * percent, height * 0.92, color=COLOURS[peers.index(row.peer) % len(COLOURS)],
            xerr=[[low * percent], [high * percent]] if unit == "ms" else None,
            error_kw={"elinewidth": 0.8, "ecolor": "#3c4043"},
            label=row.peer if row.name == names[0] else None,
        )  # fmt: skip
        axis.text(
            (row.median + high) * percent + 1, place, f"{short(row.median)} {unit}", va="center", fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    axis.axvline(100, color="#3c4043", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.01)
    axis.set_xlabel(f"{'time' if unit == 'ms' else 'memory'}, % of {peers[0]} (shorter is better)")
    axis.spines[["top", "right"]].set_visible(False)


def wrap(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` characters, broken between its "; " parts."""
    lines = [""]
    for part in text.split("; "):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part + "; "
    return [line.rstrip("; ") for line in lines]
