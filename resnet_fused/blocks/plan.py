"""Which variant of a chain to run: plain or Gram join, for the last step and for the projection.

A cost model counts what the two variants do differently. Writing z, its passes forward and backward cost bytes; the
Gram matrix, its correction of the gradient and the small matrix products cost FLOPs::

    plain: 7 passes over z beyond the convolutions: write, statistics, normalise; sums, apply (2 reads, 1 write)
    gram:  M*C*(C+1) + 2*M*C*C for the Gram matrix and the correction, 4 products of [K, C] and [C, C],
           1 more read of the input, and an add for the correction's write

The Gram join also saves the bytes of z between forward and backward, the reason it exists: it is taken unless the model
expects it to be slower by more than :data:`TOLERATED` of the last convolution's time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from ..backends import onednn
from ..steps import Chain, Step, StepTensors

Tensor = torch.Tensor

#: Share of the last convolution's forward and backward time that a Gram join may cost, for the memory it saves.
TOLERATED = 0.10
PLAIN_PASSES = 7


@dataclasses.dataclass(frozen=True)
class Device:
    """What the cost model needs to know of a device."""

    name: str
    flops: float  # per second, of a good matrix product
    bandwidth: float  # bytes per second


#: One core; the choice depends on the ratio alone. 85 GFLOP/s in f32 convolutions and 7 GB/s were measured on an
#: AMD EPYC (Zen 3) with 2 cores.
CPU_CORE = Device("cpu core", 85e9, 7e9)


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of a variant beyond what both variants do, and the convolution's own FLOPs."""

    plain_bytes: int
    gram_flops: int
    gram_bytes: int
    conv_flops: int

    def gram_share(self, device: Device) -> float:
        """Time that the Gram join is expected to add, as a share of the convolution's; negative where it is faster."""
        plain = self.plain_bytes / device.bandwidth
        gram = self.gram_flops / device.flops + self.gram_bytes / device.bandwidth
        return (gram - plain) * device.flops / self.conv_flops


def cost(pixels: int, inputs: int, outputs: int, element_size: int) -> Cost:
    """Costs of the join of a 1x1 convolution from `inputs` to `outputs` channels over `pixels` outputs."""
    small = 4 * 2 * outputs * inputs * inputs
    return Cost(
        plain_bytes=PLAIN_PASSES * pixels * outputs * element_size,
        gram_flops=pixels * inputs * (inputs + 1) + 2 * pixels * inputs * inputs + small,
        gram_bytes=4 * pixels * inputs * element_size,
        conv_flops=6 * pixels * inputs * outputs,
    )


@functools.lru_cache(maxsize=4096)
def _pays(pixels: int, inputs: int, outputs: int, element_size: int, device: Device) -> bool:
    return cost(pixels, inputs, outputs, element_size).gram_share(device) <= TOLERATED


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


def _worth(step: Step, tensors: StepTensors, x: Tensor, pixels: int) -> bool:
    if gram_obstacle(step, tensors):
        return False
    if not step.norm.batch_stats:
        return True
    outputs, inputs = tensors.weight.shape[:2]
    return _pays(pixels, inputs, outputs, x.element_size(), CPU_CORE)


def choose_variant(
    chain: Chain, x: Tensor, tensors: list[StepTensors], shapes: list[torch.Size], sample_factor: Tensor | None
) -> Chain:
    """`chain` with its variants chosen for this input. `shapes`: output shape of each step."""
    if not _runs_folded(chain, x):
        _note(chain, False, False, "no convolution with an epilogue there")
        return chain
    n, _, h, w = shapes[-1]
    pixels = n * h * w
    last = chain.steps[-1]
    main = sample_factor is None and _worth(last, tensors[len(chain.steps) - 1], x, pixels)
    if last.norm.batch_stats and last.conv.stride != (1, 1):
        main = False  # its input would have to be strided first; only projections are such, and have their own flag
    projection = chain.shortcut is not None and _worth(chain.shortcut, tensors[-1], x, pixels)
    if observers:
        _note(chain, main, projection, _why(chain, tensors, x, pixels, sample_factor))
    return dataclasses.replace(chain, gram=main, gram_shortcut=projection)


#: Called with a line of text for every choice, by ``explain``.
observers: list[Callable[[str], object]] = []


def _note(chain: Chain, main: bool, projection: bool, why: str) -> None:
    for observer in observers:
        kind = {True: "Gram join", False: "plain join"}
        text = kind[main] + (f", shortcut {kind[projection]}" if chain.shortcut is not None else "")
        observer(f"{text} ({why})")


def _why(chain: Chain, tensors: list[StepTensors], x: Tensor, pixels: int, sample_factor: Tensor | None) -> str:
    step, own = chain.steps[-1], tensors[len(chain.steps) - 1]
    if sample_factor is not None:
        return "a per-sample factor"
    if gram_obstacle(step, own):
        return gram_obstacle(step, own)
    if not step.norm.batch_stats:
        return "running statistics"
    outputs, inputs = own.weight.shape[:2]
    expected = cost(pixels, inputs, outputs, x.element_size())
    return f"costs {expected.gram_share(CPU_CORE):+.0%} of its convolution's time"
