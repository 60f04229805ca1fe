"""A 3x3 weight as Winograd's filtering multiplies by it: made once, for many calls of `winograd_conv3x3_add_relu`.

Formula, with M = outputs, 2 or 4, and G the transform of F(MxM, 3x3) (Lavin & Gray 2016)::

    packed[k // 32, (M+2)*i + j, c, k % 32] = scale[k] * (G weight[k, c] G')[i, j]        zeros beyond the last k

With a stride of 2, and M = 2, G has the rows g0, g1, g0 + g2, g2, g1, of which the first two, the third, and the last
two make a sum each: packed has 25 values, those of one sum in each direction side by side.

`weight`: ``[K, C, 3, 3]`` float32, of any strides; `scale`: ``[K]`` or None for 1; `packed`: ``[ceil(K/32), values, C,
32]``, of sums in double, rounded once.
"""

from __future__ import annotations

import torch

from .contract import Tensor, define, nbytes

SCHEMA = "(Tensor weight, Tensor? scale=None, int outputs=2, int stride=1) -> Tensor packed"
COLUMNS = 32
_A, _B = 0.625**2, 1.5**2  # squares of the points of F(4x4) that are neither 0 nor infinity


def _rows() -> dict[tuple[int, int], list[list[float]]]:
    """G by M and stride."""
    four = [[1 / (_A * _B), 0.0, 0.0]]
    for square, other in ((_A, _B), (_B, _A)):
        norm = 2 * square * (square - other)
        for point in (square**0.5, -(square**0.5)):
            four.append([1 / norm, point / norm, square / norm])
    two = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]]
    strided = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    return {(2, 1): two, (4, 1): [*four, [0.0, 0.0, 1.0]], (2, 2): strided}


_G = _rows()
_SUMS = {1: None, 2: ((0, 1), (2,), (3, 4))}  # by stride, the values that make a sum; None: each does


def _values(outputs: int, stride: int) -> int:
    return len(_G[outputs, stride]) ** 2


def _order(outputs: int, stride: int) -> list[int]:
    """Which value of G weight G', row by row, lies at each place."""
    side = len(_G[outputs, stride])
    sums = _SUMS[stride] or tuple((i,) for i in range(side))
    return [i * side + j for rows in sums for columns in sums for i in rows for j in columns]


def reference(weight: Tensor, scale: Tensor | None = None, outputs: int = 2, stride: int = 1) -> Tensor:
    g = torch.tensor(_G[outputs, stride], dtype=torch.float64, device=weight.device)
    wide = weight.double() if scale is None else weight.double() * scale.double().view(-1, 1, 1, 1)
    u = torch.einsum("ir,kcrs,js->ijkc", g, wide, g).flatten(0, 1)[_order(outputs, stride)]
    u = torch.nn.functional.pad(u, (0, 0, 0, -weight.shape[0] % COLUMNS)).unflatten(1, (-1, COLUMNS))
    return fake(weight, scale, outputs, stride).copy_(u.permute(1, 0, 3, 2))


def fake(weight: Tensor, scale: Tensor | None = None, outputs: int = 2, stride: int = 1) -> Tensor:
    k, c = weight.shape[:2]
    return weight.new_empty((-(-k // COLUMNS), _values(outputs, stride), c, COLUMNS))


def bytes(weight: Tensor, scale: Tensor | None = None, outputs: int = 2, stride: int = 1) -> int:
    """One read of `weight`, one write of `packed`."""
    k, c = weight.shape[:2]
    return nbytes(weight) + -(-k // COLUMNS) * COLUMNS * c * _values(outputs, stride) * weight.element_size()


def flops(weight: Tensor, scale: Tensor | None = None, outputs: int = 2, stride: int = 1) -> int:
    """Of a transform by three columns and then three rows, two per multiply-add."""
    inputs = len(_G[outputs, stride])
    return 2 * weight.shape[0] * weight.shape[1] * (9 * inputs + 3 * inputs**2)


OP = define("winograd_weight3x3", SCHEMA, reference=reference, fake=fake, bytes=bytes, flops=flops, compiled=True)
