"""Default tiles of the products of dense layers, entered among those of :mod:`.configs`."""

from __future__ import annotations

import dataclasses

from . import configs
from .configs import Config, both_gradients_and_sums, default, power_of_two


def taps(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """A 3x3 convolution to few channels: its loop over nine taps is long, its accumulator small."""
    return dataclasses.replace(
        default(arch, element_size, columns, depth), block_n=power_of_two(columns, 16, 64), warps=8
    )


def taps_ieee(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The same on the ordinary units."""
    return Config(64, power_of_two(columns, 16, 32), 16, 4, 2)


def gradient_of_taps(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The gradient of its input: a loop over nine taps of few channels, and an epilogue with sums."""
    return Config(64, power_of_two(columns, 16, 256 // element_size), power_of_two(depth, 16, 64 // element_size), 8, 2)


def weight_gradient_of_taps(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The gradient of three of its taps: an accumulator each of columns by depth."""
    return Config(
        128 // element_size, power_of_two(columns, 16, 128), power_of_two(depth, 16, 128 // element_size), 8, 2
    )


def both_gradients_of_slices(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """As `both_gradients_and_sums`; float32 takes half of the rows and columns, sm_100 half of the rows: it spilled."""
    chosen = both_gradients_and_sums(arch, element_size, columns, depth)
    if arch // 10 == 10:
        chosen = dataclasses.replace(chosen, block_m=min(chosen.block_m, 32))
    half = Config(32, min(chosen.block_n, 32), min(chosen.block_k, 64), 8, 2, 255)
    return half if element_size == 4 else chosen


def both_gradients_of_slices_ieee(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The same on the ordinary units; in one stage, it spilled."""
    return Config(16, power_of_two(columns, 16, 32), power_of_two(depth, 16, 32), 8, 2)


def weight_gradient_of_taps_ieee(arch: int, element_size: int, columns: int, depth: int) -> Config:
    """The same on the ordinary units."""
    return Config(16, power_of_two(columns, 16, 64), power_of_two(depth, 16, 32), 8, 2)


configs.DEFAULTS.update(
    {
        "dense_conv3x3": taps,
        "dense_conv3x3 ieee": taps_ieee,
        "dense_conv3x3_backward": gradient_of_taps,
        "dense_conv3x3_backward ieee": taps_ieee,
        "dense_conv3x3_wgrad": weight_gradient_of_taps,
        "dense_conv3x3_wgrad ieee": weight_gradient_of_taps_ieee,
        "dense_conv1x1_backward": both_gradients_of_slices,
        "dense_conv1x1_backward ieee": both_gradients_of_slices_ieee,
    }
)
