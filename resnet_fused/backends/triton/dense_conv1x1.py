"""`dense_conv1x1` in Triton: the kernels of :mod:`.conv1x1`, on pixels that lie further apart than their channels.

Bytes moved as there. Compiled and interpreted, not yet run on hardware.
"""

from __future__ import annotations

from ...ops import dense_conv1x1 as op
from ...ops.contract import Tensor, channels_last_strides
from . import bn_affine, checks, common, conv1x1, gemm
from .dense_tiles import check_slice

NAME = op.OP.name


def run(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`resnet_fused.ops.dense_conv1x1`. Raises RuntimeError on wrong shapes, dtypes, devices, layouts."""
    check_slice(NAME, "x", x)
    gemm.check_weight(NAME, "weight", weight, x, None, x.shape[1])
    checks.vector(NAME, "scale", scale, x)
    checks.vector(NAME, "shift", shift, x)
    k = weight.shape[0]
    shape = x.shape[0], k, *x.shape[2:]
    z = x.new_empty_strided(shape, channels_last_strides(shape))
    found = bn_affine.outputs(NAME, x, k if statistics else 0, None, None, None)
    if z.numel() == 0 or x.shape[1] == 0:
        return z.zero_(), *found.of_nothing(z)[:2]
    conv1x1.start(x, weight, (scale, shift), z, found=found if statistics else None)
    return z, *found.results[:2]


KERNEL = common.register(op.OP, run)
