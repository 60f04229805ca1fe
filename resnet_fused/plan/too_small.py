"""Which chains are too small to gain by fusion on a CPU: they run in stock operations, with all that those save.

A fused chain takes about 1 ms longer to start than stock (forward and backward, in Python), and gains by passes over
activations that it leaves out. Those cost little as long as everything lies in the last-level cache, so that is where
the limit is drawn: where the tensors that stock keeps for backward fit into it. Measured on a CPU with AVX-512 and a
cache of 32 MiB, ResNet-50's blocks by themselves: benchmarks/results/epyc-avx512-2core/runs.jsonl:8. On
other CPUs our weight gradients are faster than oneDNN's at any size, and nothing is too small.

Where that 1 ms is less than :data:`MARGIN` of the convolutions' time, the memory that fusion saves is worth it.

Large weights are the exception: where few pixels meet them, fused chains gain by other products (:mod:`..steps.conv`),
about 1 ms for a million elements. Not where plain products are slow: there ResNet-50's layer4, at 2 to 128 output
pixels, took 1.04 to 2.2 times as long fused as stock (one thread of such an EPYC).
"""

from __future__ import annotations

import functools
import pathlib

import torch

from ..backends import onednn
from ..steps import Chain, Conv, StepTensors
from ..steps.conv import HAS_AVX512, SLOW_PRODUCTS, is_product
from .keys import threads

Tensor = torch.Tensor
#: Elements of a stem's convolution up to which its pass with the pool is taken to save less than Python takes for it.
FEW_POOLED = 1 << 16
_USUAL_CACHE = 32 << 20
_LARGE_WEIGHTS = 1 << 20  # elements
#: What a chain may take longer for the memory that it saves, as a share of its time; also by `tune`'s measure.
MARGIN = 0.02
_OVERHEAD = 1.3e-3  # seconds; of chains with a Gram join somewhat more
#: FLOP/s of a thread in float32 convolutions; measured on Zen 4: 170 to 210 by two threads. Zen 5's units, which
#: make plain products slow beside oneDNN, are twice as wide. Told by the processor's family, not by a
#: measurement, which load disturbs and each process would make anew, nor by the frequency, which virtual machines may
#: misstate. A processor that nobody measured has the lower rate, which keeps fusion.
_RATE = 100e9


def rate(dtype: torch.dtype) -> float:
    """FLOP/s of a thread in convolutions of `dtype`: as many times float32's as it has elements in a register.

    Without instructions for 16 bits, oneDNN converts, and is no faster than in float32.
    """
    single = 2 * _RATE if SLOW_PRODUCTS else _RATE
    return single * (4 / dtype.itemsize if dtype in onednn.SERVED or dtype.itemsize > 4 else 1)


@functools.cache
def cache_bytes() -> int:
    """Size of the first core's largest cache; 32 MiB where the kernel does not tell."""
    units, sizes = {"K": 1 << 10, "M": 1 << 20}, [0]
    for file in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * units[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(sizes) or _USUAL_CACHE


def stock_bytes(chain: Chain, x: Tensor, shapes: list[torch.Size]) -> int:
    """What stock saves of the chain: its input and, for each step, what batch norm and what ReLU leaves to be read."""
    values = x.numel() + 2 * sum(shape.numel() for shape in shapes)
    values += shapes[-1].numel() if chain.shortcut is not None else 0
    return values * x.element_size()


def _convolutions(chain: Chain, tensors: list[StepTensors], shapes: list[torch.Size]) -> list[tuple[Conv, Tensor, int]]:
    """Geometry, weight and output pixels of each; the shortcut's output has the shape of the last step's."""
    places = zip(chain.all_steps, tensors, [*shapes, shapes[-1]], strict=False)
    return [(step.conv, own.weight, shape[0] * shape[2] * shape[3]) for step, own, shape in places]


def stays_in_cache(saved: int, flops: int, dtype: torch.dtype) -> bool:
    """Whether passes over what stock saves cost little, and Python much beside the convolutions' FLOPs."""
    return saved <= cache_bytes() and _OVERHEAD * rate(dtype) * threads() >= MARGIN * flops


def is_small(chain: Chain, x: Tensor, tensors: list[StepTensors], shapes: list[torch.Size]) -> bool:
    """Whether stock's operations are expected to be faster than any variant of the chain."""
    if not HAS_AVX512 or x.device.type != "cpu" or chain.backend != "auto":
        return False
    convolutions = _convolutions(chain, tensors, shapes)
    flops = sum(6 * weight.numel() * pixels for _, weight, pixels in convolutions)  # forward and both gradients
    if not stays_in_cache(stock_bytes(chain, x, shapes), flops, x.dtype):
        return False
    if SLOW_PRODUCTS:
        return True
    large = [weight.numel() for conv, weight, pixels in convolutions if is_product(pixels, weight, conv, x)]
    return sum(large) < _LARGE_WEIGHTS
