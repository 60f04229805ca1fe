"""What a report says, as markdown: models beside their peers, kernels beside the copy, parts, and what was wrong."""

from __future__ import annotations

from collections.abc import Iterable

from .. import peers
from ..records import short
from .stream import Document

MOST_FAILURES = 20


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A markdown table: the first column is text, the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def timed(document: Document, *parts: str) -> list[dict]:
    """Whole times of peers in `parts`."""
    laps = ("total", "forward", "backward")
    found = (row for row in document.rows if row["part"] in parts and row.get("peer") and row.get("ms"))
    return [row for row in found if row.get("lap") in laps]


def models(document: Document) -> str:
    """Models and blocks: milliseconds of each peer, and how much faster than eager it was in the same run."""
    found = timed(document, "models", "evaluation", "cuda_graph", "compiled", "blocks")
    keys = dict.fromkeys((row["part"], row["name"], row["mode"], row["lap"], row["batch"]) for row in found)
    names = list(dict.fromkeys(row["peer"] for row in found))
    names.sort(key=lambda peer: (peer != peers.STOCK, peer != peers.OURS))
    lines = []
    for key in keys:
        of_key = {r["peer"]: r for r in found if (r["part"], r["name"], r["mode"], r["lap"], r["batch"]) == key}
        _, name, mode, lap, batch = key
        what = mode if lap == "total" else f"{mode}, {lap}"
        cells = [f"{short(of_key[p]['ms'])} ({of_key[p]['ratio']:.2f}x)" if p in of_key else "" for p in names]
        lines.append([f"{name}, {what}, batch {batch}", *cells])
    return table(["ms (against eager)", *names], lines) if lines else ""


def kernels(document: Document) -> str:
    """Of each op in the first model's training step: time of all its calls, and bandwidth beside the copy's."""
    rows = [row for row in document.rows if row["part"] == "bandwidth" and row.get("share_of_copy") is not None]
    if not rows:
        return ""
    first = rows[0]["by"]
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["by"] == first:
            groups.setdefault((row["name"], row["backend"]), []).append(row)
    lines = []
    for (op, backend), group in sorted(groups.items(), key=lambda item: -spent(item[1], "ms")):
        shares = [row["share_of_copy"] for row in group]
        moved, milliseconds = spent(group, "bytes"), spent(group, "ms")
        rate, wrong = moved / milliseconds / 1e6, sum(row["status"] == "failed" for row in group)
        cells = [str(len(group)), short(milliseconds), short(spent(group, "predicted_ms")), short(rate)]
        cells += [f"{min(shares):.2f}-{max(shares):.2f}", f"{wrong} WRONG" if wrong else "all agree"]
        lines.append([f"{op} ({backend})", *cells])
    head = [f"op in {first}", "calls", "ms a step", "predicted", "GB/s", "of the copy", "against float64"]
    return table(head, lines)


def spent(rows: list[dict], key: str) -> float:
    """A figure of all calls of a step."""
    return sum(row[key] * row["used"] for row in rows)


def parts(document: Document) -> str:
    """What ran."""
    lines = []
    for part in document.parts:
        rows = [row for row in document.rows if row["part"] == part["name"]]
        count = {s: sum(row["status"] == s for row in rows) for s in ("failed", "skipped", "error", "died", "cut off")}
        others = ", ".join(f"{n} {status}" for status, n in count.items() if n)
        lines.append([part["name"], part["status"], f"{part['seconds']:.0f}", str(len(rows)), others, part["reason"]])
    return table(["part", "status", "s", "rows", "of them", "reason"], lines)


def failures(document: Document) -> str:
    """One line for each check that failed."""
    found = document.failures()
    lines = [f"FAILED {describe(row)}" for row in found[:MOST_FAILURES]]
    more = [f"and {len(found) - MOST_FAILURES} more"] if len(found) > MOST_FAILURES else []
    return "\n".join(lines + more)


def describe(row: dict) -> str:
    """A row that is wrong, in a line."""
    match = row.get("match") or row
    why = row.get("reason") or row.get("note") or f"error {match.get('error')}, allowed {match.get('allowed')}"
    return f"{row['part']}: {row['item']}" + (f", {row['case']}" if row.get("case") else "") + f": {why}"


def provenance(document: Document) -> str:
    """Where it comes from, in a line."""
    return "; ".join(f"{key} {value}" for key, value in document.provenance.items())


def verdicts(document: Document) -> list[dict]:
    """The rows of kernels' self-checks as ``verify --json`` writes them."""
    return [row | {"op": row["name"]} for row in document.rows if row["part"] == "selfcheck" and "backend" in row]


def summary(document: Document) -> str:
    """What a terminal shows at the end: the parts last, as a log often keeps the end alone."""
    tuned = f"{len(document.tuned)} tiles were faster than those in use" if document.tuned else ""
    ended = "" if document.complete else "Interrupted: parts are missing."
    texts = (models(document), kernels(document), tuned, failures(document), provenance(document))
    return "\n\n".join(text for text in (*texts, parts(document), ended) if text)
