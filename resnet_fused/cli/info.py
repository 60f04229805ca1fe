"""``info``: versions, what was built, what is loaded or why not, and who runs which op on this machine."""

from __future__ import annotations

import argparse
import json
import platform

import torch

from .. import __version__, library
from ..backends import backends
from ..backends.selfcheck.cases import cases
from ..backends.selfcheck.draws import place
from ..bench import records
from ..ops import OPS

YES = "yes"


def run(options: argparse.Namespace) -> int:
    """Print everything, as tables or as JSON."""
    found = collect()
    print(json.dumps(found, indent=1) if options.json else markdown(found))
    return 0


def collect() -> dict:
    """All facts, as plain data."""
    status = library.status()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": {
            "resnet_fused": __version__,
            "git": records.git_revision(),
            "python": platform.python_version(),
            "torch": status.torch,
            "triton": status.triton or "not installed",
            "cuda of torch": torch.version.cuda or "none",
        },
        "machine": machine(),
        "built": status.build_info,
        "libraries": {
            "_C (CPU kernels)": f"loaded: {status.cpu.path}"
            if status.cpu.loaded
            else f"not loaded: {status.cpu.reason}",
            "_cuda (CUDA kernels)": f"loaded: {status.cuda.path}"
            if status.cuda.loaded
            else f"not loaded: {status.cuda.reason}",
        },
        "device of the table": str(device),
        "backends": {name: backend.unavailable or "available" for name, backend in backends().items()},
        "ops": {op: serving(op, device) for op in OPS},
    }


def machine() -> dict[str, str]:
    """Processor and GPUs."""
    found = {"cpu": records.device_name(torch.device("cpu")), "threads": str(torch.get_num_threads())}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    if torch.cuda.device_count() == 0:
        found["gpu"] = "none that torch can use"
    return found


def serving(op: str, device: torch.device) -> dict[str, str]:
    """For every backend "yes" or why it does not run a float32 case of `op` on `device`."""
    case = place(cases(op, torch.float32)[0], torch.float32, device)
    reasons = {name: backend.reasons(op, case.args, case.kwargs) for name, backend in backends().items()}
    return {name: "; ".join(why) or YES for name, why in reasons.items()}


def markdown(found: dict) -> str:
    """The facts as markdown."""
    names = list(found["backends"])
    parts = []
    for title in ("versions", "machine", "built", "libraries"):
        rows = found[title] or {"nothing": "the compiled library is not loaded"}
        parts.append(table([title, ""], [[key, value] for key, value in rows.items()]))
    parts.append(table(["backend", "on this machine"], [[name, text] for name, text in found["backends"].items()]))
    cells = [
        [op, *(short_answer(served[name], found["backends"][name]) for name in names)]
        for op, served in found["ops"].items()
    ]
    parts.append(table([f"op on {found['device of the table']}", *names], cells))
    return "\n\n".join(parts)


def short_answer(answer: str, unavailable: str) -> str:
    """A backend that is missing as a whole said why once already."""
    return "-" if answer == unavailable else answer


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
