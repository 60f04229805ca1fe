"""What the examples accept on their command lines, each refusal being one line that names the option."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import nn

from resnet_fused.bench.errors import Refused
from resnet_fused.bench.named import build


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def number(kind: type, low: float = 0, below: float = math.inf) -> Callable[[str], float]:
    """The type of an argument: a finite number, int or float, of at least `low` and less than `below`."""

    def checked(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < below:
            limit = "" if below == math.inf else f" and less than {below}"
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text} is not a {name} of at least {low}{limit}")
        return value

    return checked


not_negative = number(float)
workers = number(int)
seed = number(int, 0, 2**32)  # NumPy's range, which is also torch's without its aliases of negative numbers


def device(text: str) -> torch.device:
    """One that can be used here. CUDA is only asked for its devices: a context on the first would take its memory."""
    try:
        found = torch.device(text)
        if found.type != "cuda":
            torch.zeros(1, device=found).item()  # "meta" computes no numbers
    except Exception as error:  # whatever its backend raises
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {first_line(error)}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text} cannot be used here: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return found


def network(name: str, classes: int) -> nn.Module:
    """A new model of that name.

    Raises:
        SystemExit: nobody has it; the text says what is accepted.
    """
    try:
        return build(name, num_classes=classes)
    except Refused as error:
        raise SystemExit(f"--model: {error}") from error


def scores_of(name: str, found: object) -> torch.Tensor:
    """What model `name` returned, which must be one tensor: some of torchvision's return several in training."""
    if not isinstance(found, torch.Tensor):
        raise SystemExit(f"--model {name} returns {type(found).__name__}, not scores of classes")
    return found


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
