"""Which variant of a chain to run: lazy or not, and plain or Gram join, for the last step and for the projection.

*Lazy* where the 1x1 kernels that apply normalisation on load run: on GPUs with Triton. The CPU's chains are not lazy;
their Gram joins go through oneDNN.

Which join, a cost model tells (:mod:`.join_cost`). In 16 bits the gradients of narrow convolutions come from one pass,
which moves fewer bytes and multiplies as much.

What is too small to gain at all runs in stock operations (:mod:`.too_small`).
Where :func:`resnet_fused.tune` has measured the variants of this very case, the model is not asked (:mod:`.measured`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .. import library
from ..backends import backends, onednn, soundness
from ..ops import DATA_DTYPES
from ..steps import Chain, Pool, Step, StepTensors, pointwise
from . import devices, join_cost, measured, needed_ops, too_small, words
from .devices import CPU_CORE, Device
from .measured import Variant

Tensor = torch.Tensor

#: Share of what a lazy chain saves anyway that kept activations may add: each saves a read and a write backward.
KEPT_SHARE = 0.20


class _Settings:
    """Process-wide: a plain attribute is what ``torch.compile`` can guard on."""

    target: Device | None = None
    tuner: Callable[..., Chain] | None = None
    fuses_all: bool = False


_settings = _Settings()
_HAS_TRITON = not backends()["triton"].unavailable


@contextlib.contextmanager
def _set(name: str, value: object) -> Iterator[None]:
    before = getattr(_settings, name)
    setattr(_settings, name, value)
    try:
        yield
    finally:
        setattr(_settings, name, before)


def planning_for(device: Device) -> contextlib.AbstractContextManager[None]:
    """Plan as on `device`, whatever tensors are on, within a ``with`` block: for `explain`, and for tests."""
    return _set("target", device)


def fusing_all() -> contextlib.AbstractContextManager[None]:
    """Fuse what is too small to gain as well, within a ``with`` block: to compare values on small inputs."""
    return _set("fuses_all", True)


def fuses_all() -> bool:
    """Whether nothing counts as too small: within :func:`fusing_all`, and in graphs, where Python takes no time."""
    return _settings.fuses_all or torch.compiler.is_compiling()


def is_asked() -> bool:
    """Whether somebody plans for another device now, or listens to what is chosen: then each call is to choose."""
    return _settings.target is not None or bool(observers)


def tuning(tuner: Callable[..., Chain]) -> contextlib.AbstractContextManager[None]:
    """Let `tuner`, called like :func:`choose_variant`, choose within a ``with`` block."""
    return _set("tuner", tuner)


def is_directed() -> bool:
    """Whether a ``with`` block directs or observes the choices, so that each must be made."""
    return _settings.fuses_all or _settings.tuner is not None or is_asked()


def on_gpu(x: Tensor) -> bool:
    """Whether `x` is on a GPU, or planned for as if it were."""
    if _settings.target is not None:
        return _settings.target is not CPU_CORE
    return x.device.type == "cuda"


def place_of(x: Tensor) -> torch.device | None:
    """Where kernels must be sound, see :func:`soundness.lacking`."""
    return x.device if _settings.target is None else None


def value_device(backend: str, x: Tensor) -> Device | None:
    """The device whose 1x1 kernels would run convolutions on values for `backend`; None: there are none."""
    if x.dtype not in DATA_DTYPES:
        return None
    if _settings.target is not None:
        return _settings.target if _settings.target is not CPU_CORE else None
    if x.device.type != "cuda" or not _HAS_TRITON or backend not in ("auto", "triton"):
        return None
    return devices.of(x.device)


def pools(chain: Chain, x: Tensor) -> bool:
    """Whether a kernel exists that normalises, clamps and pools in one pass."""
    if x.device.type == "cpu" and _settings.target is None:
        return chain.backend in ("auto", "cpu") and library.status().cpu.loaded
    stem = dataclasses.replace(chain, pool=Pool())
    return value_device(chain.backend, x) is not None and not needed_ops.lacking(stem, x, [], place_of(x))


def _runs_folded(chain: Chain, x: Tensor) -> bool:
    """Whether a join with an epilogue exists for this case: the CPU's, through oneDNN."""
    return chain.backend in ("auto", "cpu") and x.device.type == "cpu" and x.dtype in onednn.SERVED


def gram_obstacle(step: Step, tensors: StepTensors) -> str:
    """Why the join of `step` cannot be a Gram join; empty if it can."""
    if not step.norm.batch_stats:
        return ""  # folding running statistics needs no Gram matrix: any convolution will do
    if not step.conv.is_pointwise(tensors.weight):
        return "not a 1x1 convolution"
    return "" if tensors.bias is None else "the convolution has a bias"


def lazy_obstacle(chain: Chain, tensors: list[StepTensors]) -> str:
    """Why the chain cannot run on values; empty if it can."""
    if not pointwise.serves(chain.steps[-1], tensors[len(chain.steps) - 1]):
        return "the last convolution is not 1x1, or has a bias"
    if chain.shortcut is not None and not pointwise.serves(chain.shortcut, tensors[-1]):
        return "the projection is not 1x1, or has a bias"
    return ""


class _Options(NamedTuple):
    """What a chain can be run as."""

    device: Device
    lazy: bool
    main: bool  # whether its last step can be a Gram join
    projection: bool  # whether its shortcut can; in a lazy chain only if the last step is one


def _options(chain: Chain, x: Tensor, tensors: list[StepTensors], sample_factor: Tensor | None) -> _Options | None:
    """None: as one thing only, not lazy and with plain joins."""
    device = value_device(chain.backend, x)
    lazy = device is not None and not lazy_obstacle(chain, tensors)
    if not lazy and (device is not None or not _runs_folded(chain, x)):
        return None
    last = chain.steps[-1]
    main = sample_factor is None and not gram_obstacle(last, tensors[len(chain.steps) - 1])
    if (lazy or last.norm.batch_stats) and last.conv.stride != (1, 1):
        main = False  # its input would have to be strided first; only projections are such, and have their own flag
    projection = chain.shortcut is not None and not gram_obstacle(chain.shortcut, tensors[-1])
    if lazy and not main:
        projection = False  # there is no pass that would add a product to a normalised tensor
    return _Options(device or CPU_CORE, lazy, main, projection)


def _worth(step: Step, tensors: StepTensors, x: Tensor, pixels: int, options: _Options) -> bool:
    if not step.norm.batch_stats:
        return True
    outputs, inputs = tensors.weight.shape[:2]
    return join_cost.pays(pixels, inputs, outputs, x.dtype, options.lazy, options.device)


def _keeps(x: Tensor, chain: Chain, tensors: list[StepTensors], shapes: list[torch.Size]) -> bool:
    """Whether to keep the activations that ATen's inner convolutions read: a small share of what is saved anyway."""
    inner = list(zip(chain.steps[1:-1], tensors[1:-1], shapes, strict=False))
    kept = sum(shape.numel() for step, own, shape in inner if not pointwise.serves(step, own))
    return kept <= KEPT_SHARE * (x.numel() + sum(shape.numel() for shape in shapes[:-1]))


def _has_narrow(chain: Chain, x: Tensor, tensors: list[StepTensors]) -> bool:
    """Whether a lazy chain has a convolution whose gradients one pass can make, in a dtype for which there is one."""
    steps = zip(chain.all_steps, tensors, strict=True)
    if not any(pointwise.serves(step, own) and pointwise.narrow(step, own.weight) for step, own in steps):
        return False
    return not soundness.lacking(("conv1x1_backward",), x.dtype, place_of(x), not isinstance(x, FakeTensor))


def variants(chain: Chain, x: Tensor, tensors: list[StepTensors], sample_factor: Tensor | None) -> list[Variant]:
    """Everything that `chain` can be run as without the reference; first, what is simplest, last, stock."""
    stock = [Variant(stock=True)] if chain.backend == "auto" else []
    options = _options(chain, x, tensors, sample_factor)
    if options is None:
        return _sound([Variant()], chain, x, tensors) + stock
    lazy, inner = options.lazy, zip(chain.steps[1:-1], tensors[1:], strict=False)
    can_keep = lazy and any(not pointwise.serves(step, own) for step, own in inner)
    kept = (False, True) if can_keep else (lazy,)
    passes = (False, True) if lazy and _has_narrow(chain, x, tensors) else (False,)
    found = [Variant()] if lazy else []
    for main in (False, True) if options.main else (False,):
        for projection in (False, True) if options.projection and (main or not lazy) else (False,):
            found += [Variant(lazy, main, projection, *both) for both in itertools.product(kept, passes)]
    return _sound(found, chain, x, tensors) + stock


def _sound(found: list[Variant], chain: Chain, x: Tensor, tensors: list[StepTensors]) -> list[Variant]:
    place = place_of(x)
    return [variant for variant in found if not needed_ops.lacking(variant.of(chain), x, tensors, place)]


def is_small(chain: Chain, x: Tensor, tensors: list[StepTensors], shapes: list[torch.Size]) -> bool:
    """In a compiled graph nothing is: what small chains lose is the time of Python."""
    if fuses_all() or _settings.target is not None:
        return False
    return too_small.is_small(chain, x, tensors, shapes)


def modelled(
    chain: Chain, x: Tensor, tensors: list[StepTensors], shapes: list[torch.Size], sample_factor: Tensor | None
) -> Chain:
    """`chain` with its variants chosen by the cost model."""
    if is_small(chain, x, tensors, shapes):
        return dataclasses.replace(chain, stock=True)
    options = _options(chain, x, tensors, sample_factor)
    if options is None:
        return chain
    n, _, h, w = shapes[-1]
    lazy, pixels = options.lazy, n * h * w
    main = options.main and _worth(chain.steps[-1], tensors[len(chain.steps) - 1], x, pixels, options)
    projection = options.projection and _worth(chain.shortcut, tensors[-1], x, pixels, options)
    keep = lazy and _keeps(x, chain, tensors, shapes)
    one_pass = lazy and _has_narrow(chain, x, tensors)
    chosen = Variant(lazy, main, projection and (main or not lazy), keep, one_pass)
    return chosen.of(chain)


def choose_variant(
    chain: Chain,
    x: Tensor,
    tensors: list[StepTensors],
    shapes: list[torch.Size],
    sample_factor: Tensor | None,
    residual: Tensor | None = None,
) -> Chain:
    """`chain` with its variants chosen for this input. `shapes`: output shape of each step."""
    if chain.pool is not None:
        return chain  # a stem: there is nothing to choose
    chosen = None
    if _settings.tuner is not None and not torch.compiler.is_compiling():
        chosen = _settings.tuner(chain, x, tensors, shapes, sample_factor, residual)
    elif _settings.target is None:
        chosen = measured.recall(chain, x, tensors, sample_factor, residual, variants)
    why = "measured"
    if chosen is None:
        chosen = modelled(chain, x, tensors, shapes, sample_factor)
        why = _why(chain, x, tensors, shapes, sample_factor) if observers else ""
    chosen, missing = needed_ops.next_sound(chosen, x, tensors, place_of(x))
    why = f"no sound kernel of {missing}" if missing else why
    for observer in observers:
        observer(f"{words.of_chain(chosen)} ({why})")
    return chosen


#: Called with a line of text for every choice, by ``explain``.
observers: list[Callable[[str], object]] = []


@contextlib.contextmanager
def observing() -> Iterator[list[str]]:
    """The choices made within a ``with`` block, a line of text each."""
    said: list[str] = []
    observers.append(said.append)
    try:
        yield said
    finally:
        observers.pop()


def _why(
    chain: Chain, x: Tensor, tensors: list[StepTensors], shapes: list[torch.Size], sample_factor: Tensor | None
) -> str:
    """Why the cost model chose as it did."""
    if is_small(chain, x, tensors, shapes):
        return "stays in the cache"
    options, step, own = _options(chain, x, tensors, sample_factor), chain.steps[-1], tensors[len(chain.steps) - 1]
    if options is None:
        none_there = value_device(chain.backend, x) is None
        return "no convolution with an epilogue there" if none_there else lazy_obstacle(chain, tensors)
    if sample_factor is not None:
        return "a per-sample factor"
    if gram_obstacle(step, own):
        return gram_obstacle(step, own)
    if not step.norm.batch_stats:
        return "running statistics"
    (n, _, h, w), (outputs, inputs) = shapes[-1], own.weight.shape[:2]
    expected = join_cost.cost(n * h * w, inputs, outputs, x.dtype, options.lazy)
    return f"costs {expected.gram_share(options.device):+.0%} of its convolution's time"
