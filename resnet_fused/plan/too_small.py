"""Which programs are too small to gain by fusion on a CPU: they run in stock operations, with all that those save.

A fused program takes about 1 ms longer to start than stock (forward and backward, in Python), and gains by passes over
activations that it leaves out. Those cost little as long as everything lies in the last-level cache, so that is where
the limit is drawn: where the tensors that stock keeps for backward fit into it. Measured on a CPU with AVX-512 and a
cache of 32 MiB, ResNet-50's blocks by themselves: benchmarks/results/epyc-avx512-2core/runs.jsonl:8. On
other CPUs our weight gradients are faster than oneDNN's at any size, and nothing is too small.

Where that 1 ms is less than :data:`MARGIN` of the convolutions' time, the memory that fusion saves is worth it. What
grouped convolutions take less by our kernels (:mod:`..steps.grouped`) is counted against it.

Where minimal filtering (:mod:`..steps.winograd`), or an average that is taken before its convolution, saves more than
the 1 ms, fusion gains in any cache.

Large weights are another exception: where few pixels meet them, fused chains gain by other products
(:mod:`..steps.conv`), about 1 ms for a million elements. Not where plain products are slow: there ResNet-50's layer4,
at 2 to 128 output pixels, took 1.04 to 2.2 times as long fused as stock (one thread of such an EPYC).
"""

from __future__ import annotations

import functools
import pathlib

import torch
from torch import Tensor

from ..backends import onednn
from ..steps import grouped, winograd
from ..steps.batch_norm import pixels
from ..steps.conv import HAS_AVX512, SLOW_PRODUCTS, is_product
from ..steps.program import Addition, Call, Convolution, Node, Normalisation
from . import averages
from .keys import threads

#: Elements of a stem's convolution up to which its pass with the pool is taken to save less than Python takes for it.
FEW_POOLED = 1 << 16
_USUAL_CACHE = 32 << 20
_LARGE_WEIGHTS = 1 << 20  # elements
#: What a chain may take longer for the memory that it saves, as a share of its time; also by `tune`'s measure.
MARGIN = 0.02
_OVERHEAD = 1.3e-3  # seconds; of chains with a Gram join somewhat more
#: Seconds that Python takes for a program in evaluation beyond what it takes for stock's modules, on a Zen 5 where the
#: weights read since its last call have displaced it from the caches (twice as long as else): with the weights as they
#: are, and with packed ones. Like what follows fitted to times of one thread, beside other work, that are not recorded.
#: On two threads of a Zen 3 whole stages that do again what they did take less, and others more.
_FEW_OVERHEAD, _PACKED_OVERHEAD = 160e-6, 250e-6
#: Seconds a byte of weight by which stock's convolutions take longer there than ours, by what ATen does: of one image
#: it takes a plain matrix product, slowly where a contiguous weight of several taps meets several pixels; of more, or
#: of large ones, oneDNN's, which reorders the weight at every call, a contiguous one of several taps faster.
_ONE_IMAGE, _CONTIGUOUS, _REORDERED, _REORDERED_CONTIGUOUS = 25e-12, 100e-12, 50e-12, 15e-12
_PLAIN = 20480  # elements of one image up to which ATen takes the plain product
#: What else a packed convolution saves of the time that :data:`_RATE` tells, and bytes a second of passes in cache.
_PACKED, _PASSES = 0.1, 10e9 if HAS_AVX512 else 24e9
#: The same of passes behind depthwise convolutions, whose values lie in the cache; told for programs with activations
#: other than ReLU, which are mostly such. Measured on MobileNetV3's blocks, 8 images of 224 pixels, by two threads.
_CACHED_PASSES = 60e9
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
    """What stock saves for backward: what convolutions and norms read, what activations made, some what they read."""
    saved = set()
    for value, node in call.program.numbered:
        if not isinstance(node, Addition):
            saved |= set(node.reads)
        if isinstance(node, Addition | Normalisation) and (node.relu or _acts(node)):
            saved.add(value)
    before = [value for value, node in call.program.numbered if _acts(node)]
    return sum(shapes[value].numel() for value in (*saved, *before)) * call.x.element_size()


def _saved_by_fewer_products(call: Call, shapes: list[torch.Size]) -> float:
    """Seconds that convolutions and their gradients take less by minimal filtering, and behind averages."""
    products = 3 * averages.saved_products(call, shapes)
    for value, node, own in call.convolutions:
        if call.x.dtype != torch.float32:
            continue
        products += winograd.saved_products(shapes[value], own.weight, node.conv, transposed=True)
        products += winograd.saved_products(shapes[node.source], own.weight, node.conv) if own.bias is None else 0
    return 2 * products / (rate(call.x.dtype) * threads())


def _saved_in_groups(call: Call, shapes: list[torch.Size]) -> float:
    """Seconds that grouped convolutions and their gradients take less by our kernels than by oneDNN's."""
    if call.x.dtype != torch.float32:
        return 0.0
    products = sum(
        grouped.saved_products(shapes[value], own.weight, node.conv) for value, node, own in call.convolutions
    )
    return 2 * products / (rate(call.x.dtype) * threads())


def passes_bytes(call: Call, shapes: list[torch.Size]) -> int:
    """What stock moves beside its convolutions: a read and a write for each norm, sum and activation."""
    elements = 0
    for value, node in call.program.numbered:
        made = isinstance(node, Normalisation | Addition)
        elements += shapes[value].numel() * (made + _acts(node) + (made and node.relu))
    return 2 * elements * call.x.element_size()


def is_small_in_evaluation(call: Call, shapes: list[torch.Size], few: bool) -> bool:
    """Whether stock's operations are expected to be faster than the steps of evaluation on a CPU.

    `few`: these read the weights as they are; else folded and packed ones are kept, whose origin is compared.
    """
    saved, flops, filtered = 0.0, 0, averages.saved_products(call, shapes)
    for (value, node), own in zip(call.program.numbered, call.tensors, strict=True):
        if isinstance(node, Convolution):
            outputs = pixels(shapes[value])
            saved += own.weight.numel() * call.x.element_size() * _slower(own.weight, shapes[node.source], outputs, few)
            flops += 2 * own.weight.numel() * outputs
            if not few and call.x.dtype == own.weight.dtype == torch.float32:
                setting = call.program.precision, threads()
                filtered += winograd.folded(shapes[node.source], own.weight, node.conv, *setting)[1]
    if few:
        return saved < _FEW_OVERHEAD
    passes = _CACHED_PASSES if any(map(_acts, call.program.nodes)) and _is_cached(call, shapes) else _PASSES
    beside = (_PACKED * flops + 2 * filtered) / rate(call.x.dtype) + passes_bytes(call, shapes) / passes
    return saved + beside / threads() < _PACKED_OVERHEAD


def _acts(node: Node) -> bool:
    """Whether that is a norm with an activation other than ReLU."""
    return isinstance(node, Normalisation) and node.act is not None


def _is_cached(call: Call, shapes: list[torch.Size]) -> bool:
    """Whether a pass over the largest value finds it in the cache, beside what it writes."""
    return 2 * max(shape.numel() for shape in shapes) * call.x.element_size() <= cache_bytes()


def _slower(weight: Tensor, image: torch.Size, outputs: int, few: bool) -> float:
    """Seconds a byte of a convolution's weight that stock takes longer."""
    contiguous = weight.is_contiguous() and weight.shape[2:].numel() > 1
    if image[0] > 1 or image[1:].numel() > _PLAIN:
        return _REORDERED_CONTIGUOUS if contiguous and not few else _REORDERED
    if contiguous and outputs > 1:
        return _CONTIGUOUS
    return _ONE_IMAGE if few else 0.0


def is_small(call: Call, shapes: list[torch.Size]) -> bool:
    """Whether stock's operations are expected to be faster than any steps. `shapes`: of the values."""
    x = call.x
    if not HAS_AVX512 or x.device.type != "cpu" or call.program.backend != "auto":
        return False
    convolutions = [(node.conv, own.weight, pixels(shapes[value])) for value, node, own in call.convolutions]
    flops = sum(6 * weight.numel() * outputs for _, weight, outputs in convolutions)  # forward and both gradients
    overhead = _OVERHEAD - _saved_in_groups(call, shapes)
    if stock_bytes(call, shapes) > cache_bytes() or overhead * rate(x.dtype) * threads() < MARGIN * flops:
        return False  # passes over what stock saves cost something, or Python little beside the convolutions
    if _saved_by_fewer_products(call, shapes) >= _OVERHEAD:
        return False
    if SLOW_PRODUCTS:
        return True
    large = [weight.numel() for conv, weight, outputs in convolutions if is_product(outputs, weight, conv, x)]
    return sum(large) < _LARGE_WEIGHTS
