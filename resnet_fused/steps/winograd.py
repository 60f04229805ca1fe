"""3x3 convolutions and their input's gradient by minimal filtering, and where that is faster on a CPU."""

from __future__ import annotations

import torch

from ..backends import run
from ..backends.place import on_cpu
from ..library import status
from ..ops.contract import is_channels_last
from .layout import Moments
from .spec import Conv

Tensor = torch.Tensor

#: Whether the library is there, and for vectors like oneDNN's: what is built without them was not measured.
IS_BUILT = status().cpu.loaded and status().build_info["cpu_level"] != "baseline"
_GEOMETRIES = (Conv(), Conv(padding=(1, 1)))
_STRIDED = (Conv(stride=(2, 2)), Conv(stride=(2, 2), padding=(1, 1)))  # in evaluation
_TILE, _LEAST_TILES = 2, 8  # outputs to a side; tiles
_TRANSFORM = {2: 200, 4: 1000}  # by outputs to a side, products that take as long as the transforms of one value's tile
_TRANSFORM_STRIDED = 300  # the same with a stride of 2
_STRIDED_CHANNELS = 16  # input channels are so many, or some times as many
_SIZES = {"default": (2,), "fast": (2, 4)}  # outputs to a side, by how exact they are to be
_IN_DOUBLE = 600  # products that take as long as a weight's element is transformed in double
_WEIGHT = 16  # products that take as long as a weight's element takes from memory
_PANEL = 32  # output channels to a transformed weight's panel, the least that is multiplied
_BLOCKS, _LEAST_BLOCK, _LARGEST_BLOCK, _VALUES = 16, 28, 84, 172 << 10  # see winograd_conv3x3_add_relu.cpp
_GROUP = 14 if IS_BUILT and status().build_info["cpu_level"] == "avx512" else 6  # tiles that registers have sums of


def takes(
    x: Tensor, weight: Tensor, conv: Conv, backend: str, transposed: bool = False, precision: str = "default"
) -> bool:
    """Whether the op `winograd_conv3x3` has this convolution, or the gradient of its input from `x`, and is faster."""
    if tuple(weight.shape[2:]) != (3, 3) or not on_cpu(x) or backend not in ("auto", "cpu"):
        return False
    here = x.dtype == weight.dtype == torch.float32 and is_channels_last(x)
    return here and tiles_of(x.shape, weight, conv, transposed, precision)[0] > 0


def tiles_of(
    shape: torch.Size, weight: Tensor, conv: Conv, transposed: bool = False, precision: str = "default"
) -> tuple[int, float]:
    """Outputs to a side of the tiles that are fastest, and how many products they save, see :func:`saved_products`.

    0 of both where a direct sum is. The weight of tiles of 4x4 is transformed at every call, in double.
    """
    saved = saved_products(shape, weight, conv, transposed)
    best = _TILE if saved else 0
    if 4 in _SIZES[precision] and saved:
        k, c = weight.shape[:2]
        grows = (2 if transposed else -2) * (1 - conv.padding[0])
        n, p, q = shape[0], shape[2] + grows, shape[3] + grows
        pixels = n * (shape[2] * shape[3] if transposed else p * q)
        tiles = n * -(-p // 4) * -(-q // 4)
        more = 9 * pixels * c * k - tiles * (36 * c * k + _TRANSFORM[4] * (c + k)) - _IN_DOUBLE * c * k
        best, saved = (4, more) if more > saved else (best, saved)
    return best, saved


def saved_products(shape: torch.Size, weight: Tensor, conv: Conv, transposed: bool = False) -> int:
    """How many multiply-adds less than a direct sum minimal filtering takes, in time; 0 where it would not be taken.

    `shape`: of what the convolution reads, or of the gradient at its output. Tensors are in float32 and on a CPU.

    M pixels take 9 C K products. T tiles of 2x2 outputs take 16 C K, and transforms of C and of K values, each as long
    as 200 products of a core at its peak, which both reach (a Zen 5 with AVX-512; 8 ps a product). The weight is
    transformed by one and reordered by the other. It is taken where it is faster by a tenth. Measured there on one
    thread beside other work, oneDNN's time by ours, forward and gradient, at batch 1 to 8, from interleaved calls
    (`benchmarks/winograd.py`; batch 8 is recorded, quiet, in benchmarks/results/epyc-zen5-2core/runs.jsonl:16):

    ======  ================  =======================  =====================
    C = K   28x28 and larger  smaller, 8 tiles or more  formula, even sizes
    ======  ================  =======================  =====================
    8       0.45 to 1.45      0.92 to 2.3              0.55
    16      0.83 to 2.2       1.1 to 4.4               0.88
    24      1.2 to 2.7        1.3 to 4.0               1.10
    32      1.6 to 2.0        1.5 to 3.7               1.26
    64      1.6 to 1.9        1.4 to 3.7               1.62
    128     1.8 to 2.0        1.4 to 2.3               1.88
    256     1.7 to 1.9        1.4 to 2.6               2.05
    512                       1.4 to 2.7               2.14
    ======  ================  =======================  =====================

    With 4 tiles, 0.9 to 1.1 forward. oneDNN without AVX-512 took 1.3 to 1.9 times as long as ours without, at batch 8.
    """
    if not IS_BUILT or conv not in _GEOMETRIES or tuple(weight.shape[2:]) != (3, 3):
        return 0
    k, c = weight.shape[:2]
    n, _, h, w = shape
    grows = (2 if transposed else -2) * (1 - conv.padding[0])
    p, q = h + grows, w + grows
    tiles, pixels = n * -(-p // _TILE) * -(-q // _TILE), n * (h * w if transposed else p * q)
    direct, ours = 9 * pixels * c * k, tiles * (16 * c * k + _TRANSFORM[_TILE] * (c + k))
    return direct - ours if tiles >= _LEAST_TILES and 10 * direct >= 11 * ours else 0


def layout(outputs: int, conv: Conv) -> bytes:
    """The layout of a weight that is transformed for tiles of so many outputs to a side."""
    return b"winograd %d, stride %d" % (outputs, conv.stride[0])


def is_layout(layout: bytes) -> bool:
    """Whether a weight of that layout is transformed for some tiles: for nobody else."""
    return layout.startswith(b"winograd")


def folded(shape: torch.Size, weight: Tensor, conv: Conv, precision: str, threads: int) -> tuple[int, float]:
    """Outputs to a side of the tiles by which a convolution in evaluation is fastest, and how many products that saves.

    0 of both where a direct sum is: oneDNN's, with a weight that is packed as well. As in :func:`saved_products`, by
    the products of a core; their weights are read from memory at every call, by all threads at its one rate, and a
    transformed one is larger. `shape`: of what the convolution reads.

    With a stride of 2, oneDNN's time by ours on two threads of a Zen 5, 8 images: 1.2 from 64 to 128 channels at 56x56,
    1.2 to 1.3 from 128 to 256 at 28x28, 1.2 from 256 to 512 at 14x14.
    """
    if not IS_BUILT or conv not in _GEOMETRIES + _STRIDED or tuple(weight.shape[2:]) != (3, 3):
        return 0, 0.0
    k, c = weight.shape[:2]
    stride, n = conv.stride[0], shape[0]
    if c * k == 0 or (stride == 2 and c % _STRIDED_CHANNELS):
        return 0, 0.0
    p, q = ((size + 2 * conv.padding[0] - 3) // stride + 1 for size in shape[2:])
    direct = (9 * n * p * q + _WEIGHT * 9 * threads) * c * k
    best, least = 0, 10 / 11 * direct
    for outputs in _SIZES[precision] if stride == 1 else (_TILE,):
        tiles, columns = n * -(-p // outputs) * -(-q // outputs), -(-k // _PANEL) * _PANEL
        if tiles < _LEAST_TILES and outputs == _TILE:
            continue
        values, transform = (outputs + 2) ** 2, _TRANSFORM[outputs]
        if stride == 2:
            values, transform = 25, _TRANSFORM_STRIDED
        rows = _values(p, outputs, stride) * _values(q, outputs, stride)
        products = n * rows * c * columns + tiles * transform * (c + k)
        products /= _share(tiles, values, c, k, threads)
        weights = _WEIGHT * values * threads * c * columns
        # Sum by sum, the weight that comes next is fetched meanwhile.
        products = max(products + weights / 4, weights) if tiles < k else products + weights
        if products < least:
            best, least = outputs, products
    return best, direct - least if best else 0.0


def _values(size: int, outputs: int, stride: int) -> int:
    """How many values the tiles along a side have: where a tile of two has one output, fewer are multiplied."""
    if outputs != _TILE:
        return -(-size // outputs) * (outputs + 2)
    return size // 2 * (outputs + 1 + stride) + size % 2 * 3


def _share(tiles: int, values: int, c: int, k: int, threads: int) -> float:
    """The share of the threads' time that the pieces of work fill."""
    if tiles < k:
        pieces = -(-k // _PANEL)
    else:
        largest = _LARGEST_BLOCK // 2 if values == 25 else _LARGEST_BLOCK
        fit = min(max(_VALUES // (values * c), _LEAST_BLOCK), largest)
        pieces = -(-tiles // (max(min(fit, tiles // _BLOCKS) // _GROUP, 1) * _GROUP))
        return min(1.0, pieces / threads)  # where there are more than threads, each gets as many
    return pieces / (-(-pieces // threads) * threads)


def convolve(
    x: Tensor, weight: Tensor, conv: Conv, backend: str, statistics: bool, precision: str = "default"
) -> tuple[Tensor, Moments | None]:
    """The convolution, and its batch statistics if they are asked for."""
    settings = conv.padding[0], False, statistics, tiles_of(x.shape, weight, conv, False, precision)[0]
    z, *moments = run("winograd_conv3x3", x, weight, *settings, backend=backend)
    return z, tuple(moments) if statistics else None


def input_grad(grad: Tensor, weight: Tensor, conv: Conv, backend: str, precision: str = "default") -> Tensor:
    """Gradient of what the convolution read."""
    settings = conv.padding[0], True, False, tiles_of(grad.shape, weight, conv, True, precision)[0]
    return run("winograd_conv3x3", grad, weight, *settings, backend=backend)[0]
