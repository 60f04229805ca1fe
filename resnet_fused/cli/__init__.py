"""The command line: ``python -m resnet_fused info | verify | warmup | bench | explain | tune | gpu-report``.

``resnet-fused`` is the same.

Results go to stdout, as markdown that can be pasted; progress and errors go to stderr. Exit codes: 0 all is well, 1 the
numbers disagree, 2 the arguments or the machine do not allow it.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..bench import runs
from ..bench.errors import Refused
from ..bench.options import DTYPES
from ..plan.devices import DEVICES

MODEL, BATCH = "resnet50", 16  # where none is named
GPU_BATCH = 256  # where none is named and the step is a GPU's
COMMANDS = "info | verify | warmup | bench | explain | tune | gpu-report"


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def image_size(text: str) -> tuple[int, ...]:
    """``N,C,H,W`` as four positive integers."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no input size; pass N,C,H,W, e.g. 16,3,224,224")
    return tuple(map(int, parts))


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def minutes(text: str) -> float:
    """A positive number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of minutes")
    return value


def output_file(text: str) -> pathlib.Path:
    """A path that can be written: better to find out before the measurement than after. It is left as it is."""
    path = pathlib.Path(text)
    try:
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: pass a file in a directory that exists"
        ) from None
    return path


def picture_file(text: str) -> pathlib.Path:
    """A path whose suffix names a picture format."""
    if pathlib.Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no picture; pass a name that ends in .png, .svg or .pdf")
    return output_file(text)


def capability(text: str) -> int:
    """``9.0`` or ``90`` as 90."""
    digits = text.replace(".", "", 1)
    if not digits.isdecimal() or not 2 <= len(digits) <= 3:
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability; pass one such as 9.0")
    return int(digits)


def parser() -> Parser:
    """The whole command line."""
    top = Parser(prog="resnet-fused", description="Residual networks, fused.")
    commands = top.add_subparsers(dest="command", required=True, metavar=COMMANDS)

    info = commands.add_parser("info", help="versions, what was built, what is loaded, who runs which op here")
    info.add_argument("--json", action="store_true", help="print JSON instead of tables")

    verify = commands.add_parser("verify", help="check every kernel and the blocks on this machine against float64")
    add_run_arguments(verify, GPU_BATCH, "bf16", model="", adds="; checks each GPU kernel that its step starts, too")
    verify.set_defaults(dtype="")  # kernels and blocks in every dtype
    verify.add_argument("--eval", action="store_true", help="an evaluation instead of a training step")
    verify.add_argument("--json", type=output_file, metavar="FILE", help="write every kernel's verdict to FILE")

    warmup = commands.add_parser("warmup", help="compile every Triton kernel of a model's step, in parallel")
    add_run_arguments(warmup, GPU_BATCH, "bf16", planned=True)
    warmup.add_argument("--eval", action="store_true", help="an evaluation instead of a training step")
    warmup.add_argument("--device-capability", type=capability, metavar="X.Y", help="of a GPU that is elsewhere: 9.0")
    warmup.add_argument("--workers", type=count, default=0, help="processes (default: one for each core)")

    explain = commands.add_parser("explain", help="the plan of each block, its traffic and memory; runs nothing")
    add_run_arguments(explain, planned=True)
    explain.add_argument("--input", type=image_size, metavar="N,C,H,W", help="in the place of --batch and --size")
    explain.add_argument("--eval", action="store_true", help="an evaluation instead of a training step")
    explain.add_argument("--json", type=output_file, metavar="FILE", help="write every figure to FILE")

    bench = commands.add_parser("bench", help="prove that fused equals stock on photographs, then time both in turn")
    add_run_arguments(bench)
    bench.add_argument("--quick", action="store_true", help="small batches and images, few repeats")
    bench.add_argument(
        "--fresh",
        type=count,
        default=0,
        metavar="N",
        help="time both in N fresh processes each as well, with two allocator settings",
    )
    bench.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="PEER",
        help="time these too: compile, freezing, onnxruntime, openvino; fuse's settings memory and fast; "
        "convolutions, stock's alone, is a bound",
    )
    bench.add_argument("--json", type=output_file, metavar="FILE", help="write every figure to FILE")
    runs.add_option(bench)
    bench.add_argument("--plot", type=picture_file, metavar="FILE", help="draw every figure to FILE (.png, .svg, .pdf)")

    tune = commands.add_parser("tune", help="measure the variants of each block here, and keep the fastest for later")
    add_run_arguments(tune)
    add_gpu_report(commands)
    return top


def add_run_arguments(
    command: argparse.ArgumentParser,
    batch: int = BATCH,
    dtype: str = "f32",
    *,
    planned: bool = False,
    model: str = MODEL,
    adds: str = "",
) -> None:
    """What every command takes that runs a model, or plans (`planned`) one for a device that need not be there.

    `batch`, `dtype`, `model`: what help calls the defaults; a command sees 0 where no batch was named. `adds`: what
    help says of the model besides.
    """
    default = f"default {model}" if model else "default: none"
    about = f"resnet50 and its like, timm:NAME or torchvision:NAME ({default}){adds}"
    command.add_argument("named", nargs="?", metavar="MODEL", help=about)
    command.add_argument("--model", help="the same, as an option")
    command.add_argument("--batch", type=count, default=0, help=f"images of a step (default {batch})")
    command.add_argument("--size", type=count, default=0, help="height and width of the images (default: the model's)")
    every = "" if model else "all; a model's step: "
    words = f"f32, or bf16 or f16 through autocast (default {every}{dtype})"
    command.add_argument("--dtype", choices=tuple(DTYPES), default=dtype, help=words)
    known = f", or one of {', '.join(DEVICES)}, which need not be there" if planned else ""
    command.add_argument("--device", default="", help=f"cpu, cuda or cuda:N{known} (default: a GPU if there is one)")
    command.set_defaults(default_model=model)


def add_gpu_report(commands) -> None:
    """The options of ``gpu-report``."""
    about = "check and time everything on a GPU, within some minutes, into one file to send"
    report = commands.add_parser(
        "gpu-report",
        help=about,
        description=f"{about[0].upper()}{about[1:]}. It has not run on a GPU yet: yours may be the first. The file "
        "holds figures, versions, the device's name and error texts, which may quote paths of this machine.",
    )
    report.add_argument("--minutes", type=minutes, default=9.0, help="for all parts together (default 9)")
    report.add_argument("--out", type=output_file, default=pathlib.Path("gpu-report.json"), metavar="FILE.json")
    report.add_argument(
        "--models", nargs="+", metavar="MODEL", help="the first in full (default: resnet50 and three more)"
    )
    report.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    report.add_argument("--parts", nargs="+", metavar="PART", help="only these (default: all)")
    report.add_argument("--batch", type=count, default=0, help="of training (default: by the GPU's memory)")
    report.add_argument("--quick", action="store_true", help="small images and few repeats, to try the command itself")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    if "named" in options:
        if options.named and options.model:
            parser().error(f"two models, {options.named!r} and {options.model!r}; pass one")
        options.model = options.named or options.model or options.default_model
    command = importlib.import_module(f".{options.command.replace('-', '_')}", __name__)
    try:
        return command.run(options)
    except Refused as error:
        print(f"resnet-fused {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
