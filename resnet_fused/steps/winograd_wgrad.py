"""Weight gradients of 3x3 convolutions by Winograd's products, and where those are as exact as stock's and faster."""

from __future__ import annotations

import torch

from ..backends import run
from ..backends.constant import constant_in_graphs
from ..backends.place import on_cpu
from ..library import status
from ..ops.contract import is_channels_last
from .spec import Conv

Tensor = torch.Tensor

IS_BUILT = status().cpu.loaded
_GEOMETRIES = (Conv(), Conv(padding=(1, 1)))
_MANY_CHANNELS = 64
#: Channels of x, to whole multiples of which products are taken: two vectors. The least that there are to be.
_PANEL = 16 if IS_BUILT and status().build_info["cpu_level"] == "avx2" else 32
_UNIT = 32  # channels of the least piece of work that a thread gets


def takes(grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str) -> bool:
    """Whether the op `winograd_conv3x3_wgrad` has this gradient, and is the better choice."""
    if tuple(weight.shape[2:]) != (3, 3) or not on_cpu(x) or backend not in ("auto", "cpu"):
        return False
    plain = conv in _GEOMETRIES and grad.dtype == x.dtype == weight.dtype == torch.float32
    fits = plain and IS_BUILT and is_channels_last(x) and is_channels_last(grad)
    return fits and _is_exact(grad, x) and _is_faster(grad, x, conv) and _occupies_threads(grad, x)


def _tiles(grad: Tensor) -> int:
    """Of 2x2 pixels."""
    n, _, p, q = grad.shape
    return n * -(-p // 2) * -(-q // 2)


def _is_exact(grad: Tensor, x: Tensor) -> bool:
    """Whether the error is at most oneDNN's, which grows with the rows of pixels; ours begins higher but grows less.

    Root mean square against float64, ours by oneDNN's: 1.0 to 1.3 just below these bounds; from there on 0.6 to 1 for
    normal values and behind a ReLU, 0.2 to 0.75 with a mean. Of values spread evenly over 12 decades up to 1.05. oneDNN
    sums few channels in another way.
    """
    tiles, rows = _tiles(grad), grad.shape[0] * grad.shape[2]
    if min(grad.shape[1], x.shape[1]) < _MANY_CHANNELS:
        return tiles >= 1024
    return tiles >= 512 or (tiles >= 256 and rows >= 112) or (256 > tiles >= 128 and rows >= 56)


def _is_faster(grad: Tensor, x: Tensor, conv: Conv) -> bool:
    """Whether this takes a sixth less time than oneDNN, by a count of multiplications.

    oneDNN leaves out those with padding. A tile takes 16 for each pair of channels, and its transforms the time of 64
    for each channel. On a Zen 5 with AVX-512, one thread beside other work, batch 8, oneDNN's time by ours and, in
    parentheses, that of both gradients in one call by ours and the input's gradient alone (recorded on a quiet machine:
    ResNet-50's shapes, 1.7 to 2.1, benchmarks/results/epyc-zen5-2core/runs.jsonl:17, ``benchmarks/weight_grad.py``):

    | channels | 56x56 | 28x28 | 14x14 | 9x9 (64) | 6x6 (64) | 5x5 (64), refused |
    | --- | --- | --- | --- | --- | --- | --- |
    | 32 | 1.6 (1.3) | 1.5 (1.2) | 1.6 (1.2), batch 16 | 1.2 (1.1) | 1.5 (1.2) | 1.15 |
    | 64 | 2.0 (1.4) | 1.6 (1.25) | 1.9 (1.3) | 1.3 (1.15) | 1.55 (1.2) | 1.07 |
    | 128 | 1.9 (1.35) | 1.8 (1.35) | 2.0 (1.4) | 1.4 (1.15) | 1.7 (1.3) | 1.08 |

    Fewer than 32 channels do not fill a panel: 24 at 28x28 took 1.1 of oneDNN's time, 8 three times as long. At AVX2
    and without, as against oneDNN held to those, ours is faster by 1.7 to 2.8 for all of these. A panel is half as wide
    there: on a Zen 3 16 channels at 32x32 took 0.41 and 24 at 28x28 0.62 of oneDNN's time, batch 8
    (benchmarks/results/epyc-avx2-2core/runs.jsonl:42).
    """
    (n, k, p, q), c = grad.shape, x.shape[1]
    hidden = 2 * conv.padding[0]  # of the taps of a row and of a column of pixels
    direct = n * (3 * p - hidden) * (3 * q - hidden) * c * k
    tiled = _tiles(grad) * (16 * k * -(-c // _PANEL) * _PANEL + 64 * (k + c))
    return min(k, c) >= _PANEL and 5 * direct >= 6 * tiled


def _occupies_threads(grad: Tensor, x: Tensor) -> bool:
    """Whether there are two pieces of work at least for every thread, as there are for two wherever this is exact."""
    pieces = max(1, grad.shape[1] // _UNIT) * max(1, x.shape[1] // _UNIT) * max(1, min(8, _tiles(grad) // 256))
    return pieces >= 2 * _threads()


@constant_in_graphs
def _threads() -> int:
    return torch.get_num_threads()


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, conv: Conv, backend: str) -> Tensor:
    """The gradient of `weight`."""
    return run("winograd_conv3x3_wgrad", grad, x, weight, conv.padding, backend=backend)
