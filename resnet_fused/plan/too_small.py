"""Which programs are too small to gain by fusion on a CPU: they run in stock operations, with all that those save.

A fused program takes about 1 ms longer to start than stock (forward and backward, in Python), and gains by passes over
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
from ..steps.conv import HAS_AVX512, SLOW_PRODUCTS, is_product
from ..steps.program import Addition, Call, Convolution, Normalisation
from ..steps.spec import Conv
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


def stock_bytes(call: Call, shapes: list[torch.Size]) -> int:
    """What stock saves for backward: what convolutions and norms read, and what ReLUs made."""
    saved = set()
    for value, node in call.program.numbered:
        if not isinstance(node, Addition):
            saved |= set(node.reads)
        if isinstance(node, Addition | Normalisation) and node.relu:
            saved.add(value)
    return sum(shapes[value].numel() for value in saved) * call.x.element_size()


def _convolutions(call: Call, shapes: list[torch.Size]) -> list[tuple[Conv, Tensor, int]]:
    """Geometry, weight and output pixels of each."""
    places = zip(call.program.numbered, call.tensors, strict=True)
    return [(node.conv, own.weight, pixels(shapes[v])) for (v, node), own in places if isinstance(node, Convolution)]


def pixels(shape: torch.Size) -> int:
    """Values a channel."""
    return shape[0] * shape[2] * shape[3]


def stays_in_cache(saved: int, flops: int, dtype: torch.dtype) -> bool:
    """Whether passes over what stock saves cost little, and Python much beside the convolutions' FLOPs."""
    return saved <= cache_bytes() and _OVERHEAD * rate(dtype) * threads() >= MARGIN * flops


def is_small(call: Call, shapes: list[torch.Size]) -> bool:
    """Whether stock's operations are expected to be faster than any steps. `shapes`: of the values."""
    x = call.x
    if not HAS_AVX512 or x.device.type != "cpu" or call.program.backend != "auto":
        return False
    convolutions = _convolutions(call, shapes)
    flops = sum(6 * weight.numel() * outputs for _, weight, outputs in convolutions)  # forward and both gradients
    if not stays_in_cache(stock_bytes(call, shapes), flops, x.dtype):
        return False
    if SLOW_PRODUCTS:
        return True
    large = [weight.numel() for conv, weight, outputs in convolutions if is_product(outputs, weight, conv, x)]
    return sum(large) < _LARGE_WEIGHTS
