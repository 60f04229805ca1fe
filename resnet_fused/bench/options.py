"""What a benchmark is asked for, and what is decided of that: sizes, rounds and the device."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from . import named
from .errors import Refused
from .timing import Rounds

#: Names of --dtype, and what they stand for: all that an op of a model takes.
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def autocast_dtype(name: str) -> torch.dtype | None:
    """What autocast casts to for a --dtype; None: it is off."""
    return None if name == "f32" else DTYPES[name]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure; zero or empty means the default for a full or a quick run."""

    model: str = "resnet50"
    batch: int = 0
    size: int = 0
    dtype: str = "f32"
    device: str = ""
    quick: bool = False
    peers: tuple[str, ...] = ()
    fresh: int = 0  # pairs of processes to time stock and ours in as well


@dataclasses.dataclass(frozen=True)
class Plan:
    """Options with every default decided: seconds are for what may take longer on a faster machine."""

    batch: int
    size: int
    eval_batches: tuple[int, ...]
    training: Rounds
    evaluation: Rounds
    blocks: Rounds


def plan_for(options: Options, model: nn.Module) -> Plan:
    """Sizes and rounds. A full ResNet-50 run takes about three minutes on two cores of a Zen 5."""
    meant_for = named.input_size(model)
    if options.quick:
        training, other = Rounds(3, 20, 4.0), Rounds(3, 20, 0.5)
        return Plan(options.batch or 4, options.size or min(128, meant_for), (1, 4), training, other, other)
    return Plan(
        options.batch or 16, options.size or meant_for, (1, 8, 32),
        training=Rounds(7, 50, 30.0), evaluation=Rounds(9, 50, 5.0), blocks=Rounds(9, 50, 2.0),
    )  # fmt: skip


def device_of(name: str, others: tuple[str, ...] = ()) -> torch.device:
    """The device called `name`, or the default: a GPU if there is one. `others` are accepted by the caller.

    Raises:
        Refused: it does not exist here.
    """
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        *accepted, last = ("cpu", "cuda", "cuda:N", *others)
        raise Refused(f"unknown device {name!r}; pass {', '.join(accepted)} or {last}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refused(f"device {name} asked for, but torch {torch.__version__} sees no GPU; pass --device cpu")
    return device
